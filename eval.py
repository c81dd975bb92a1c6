"""Evaluates finished runs: scores with intervals, per-token advantages, and an HTML page of both.

    python eval.py runs/grpo runs/reference runs/critique       the table
    python eval.py --advantages runs/critique                   its attempts under every context
    python eval.py runs/grpo runs/critique --html report.html   both, with learning curves

A model folder or hub id may replace a run. Runs that differ only in their seed share a row.
Intervals are 95% bootstraps over problems. Samples are cached in runs/.cache. All settings of sd.py
are options, too, as --temperature; they default to the first run's, --seed to 2.
Shapes: P problems, S seeds, Q quantities, T tokens of an attempt.
"""

import argparse
import html
import inspect
import json
import math
import re
import runpy
import shlex
import sys
from dataclasses import dataclass, replace
from itertools import accumulate, combinations, compress, pairwise
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

import critic
import sd
from critic import UserError, atomic_write, first_difference, parse_steps

# Token kinds in a wrong attempt: KINDS if the critic has a judge of steps, else PLACES.
KINDS = ["right step", "wrong value", "rest of wrong step", "answer"]
PLACES = ["before wrong step", "in wrong step", "after wrong step"]


# ================================================================================ runs and models
@dataclass
class Subject:
    name: str  # folder of a run or model, or a hub id
    model: str  # where its weights are; for a run, those of its best checkpoint
    base: str  # the teacher: the model a run started from, or the plain model itself
    cfg: object = None  # runs only: the settings
    curve: dict = None  # runs only: {step: validation Avg}
    best_step: int = None  # runs only: that of the best checkpoint; 0: none beat the base

    def load(self, cfg):
        """(model, tokenizer). A run's checkpoint is loaded as it was saved, in fp32."""
        return sd.load_model(self.model, cfg.device, "float32" if self.best_step else cfg.dtype)


def open_subject(name):
    """The Subject of a run's folder, a model's folder or a hub id."""
    folder = Path(name)
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    if not config.exists() and (folder.is_dir() or folder.parent.name == "runs"):
        hint = f"; for all runs in it, pass {name}/*" * folder.is_dir()
        raise UserError(f"{name} is no run and no model{hint}")
    if not metrics.exists():
        return Subject(name, name, name)
    try:
        cfg = sd.parse_args([], json.loads(config.read_text()))
        lines = map(json.loads, metrics.open())
        curve = {line["step"]: line["val_avg"] for line in lines if "val_avg" in line}
        best_step = max(curve, key=curve.get)
    except ValueError as error:
        raise UserError(f"{name}: config.json or metrics.jsonl is broken: {error!r}") from None
    model = f"{name}/best" if best_step else cfg.model
    return Subject(name, model, cfg.model, cfg, curve, best_step)


def describe_training(runs):
    """How long each run was trained, with a warning if that differs."""
    text = ""
    for run in runs:
        size = f"{run.cfg.problems_per_step} x {run.cfg.group_size} rollouts, lr {run.cfg.lr:g}"
        best = run.best_step or "0, the base"
        text += f"{run.name}: {max(run.curve)} steps of {size}; best step {best}\n"
    if len({max(run.curve) * run.cfg.problems_per_step for run in runs}) > 1:
        text += "WARNING: unequal budgets: the runs differ in the number of problems trained on\n"
    return text


def rows_of(subjects):
    """{label: subjects}: bases and plain models, then runs; seeds of one recipe share a row."""
    bases = dict.fromkeys(s.base for s in subjects)
    rows = {base if len(bases) > 1 else "base": [open_subject(base)] for base in bases}
    labels = {}  # {recipe: folder of its first run}
    for run in subjects:
        if run.cfg:
            recipe = repr(vars(run.cfg) | dict.fromkeys(sd.OVERRIDES | {"seed"}))
            rows.setdefault(labels.setdefault(recipe, run.name), []).append(run)
    return rows


@dataclass
class Attempt(sd.Rollout):  # without a teacher, `advantages` is empty
    condition: str = None  # the context it is scored under
    tokens: list = None  # each token's part of the text: [T]
    kinds: list = None  # kind of each token: [T]; [] if right or not judged
    teacher_right: float = math.nan  # 1 if the teacher's own sample is right


def write(path, text):
    if path:
        with atomic_write(path) as file:
            file.write(text.encode())


def sample(model, tokenizer, chats, cfg):
    """A graded Attempt for each (problem, prompt). The token ids of each batch are cached."""
    settings, completions = [cfg.gen_batch, cfg.max_new_tokens, cfg.temperature], []
    starts = range(0, len(chats), cfg.gen_batch)
    for start in tqdm(starts, model.name_or_path, leave=False, disable=None):
        batch = [prompt for _, prompt in chats[start : start + cfg.gen_batch]]
        identity = [model.fingerprint, cfg.device, cfg.seed, settings, start, batch]
        file = critic.cache_file("eval", identity)
        if not file.exists():
            torch.manual_seed(cfg.seed + start)
            write(file, json.dumps(sd.generate(model, tokenizer, batch, *settings)))
        completions += json.loads(file.read_text())
    attempts, others = [], [problem for problem, _ in chats[1:] + chats[:1]]
    for (problem, prompt), completion, other in zip(chats, completions, others, strict=True):
        text = sd.completion_text(model, tokenizer, completion)
        reward = float(critic.is_correct(text, problem.answer))
        cut_off = completion[-1] not in model.generation_config.eos_token_id
        attempts.append(Attempt(problem, prompt, completion, text, reward, cut_off, other))
    return attempts


def sample_attempts(model, tokenizer, problems, cfg):
    """cfg.k attempts at each problem; neighbours differ in problem."""
    prompts = sd.solver_prompts(tokenizer, problems)
    return sample(model, tokenizer, [*zip(problems, prompts, strict=True)] * cfg.k, cfg)


# ================================================================================ scores
def intervals(values, names):
    """Means over problems, 95% bootstrap: [P, Q] -> {name: [mean, low, high]}. NaNs are skipped."""
    torch.manual_seed(0)  # every call draws the same problems
    means = values[torch.randint(len(values), (2000, len(values)))].nanmean(1)  # [draws, Q]
    ends = means.nanquantile(torch.tensor([0.025, 0.975]), dim=0)  # [2, Q]
    columns = torch.stack([values.nanmean(0), *ends], 1).tolist()
    return {n: c for n, c in zip(names, columns, strict=True) if not math.isnan(c[0])}


def group_scores(attempts):
    """[Avg@k, Maj@k, Pass@k, mean length] of k attempts at a problem; ties share Maj's point."""
    rewards = [100 * a.reward for a in attempts]
    texts = [a.text for a in attempts]
    votes = [sum(critic.is_correct(a, critic.last_answer(b)) for b in texts) for a in texts]
    winners = compress(rewards, [count == max(votes) for count in votes])
    length = fmean(len(a.completion) for a in attempts)
    return [fmean(rewards), fmean(winners), max(rewards), length]


def measure(subjects, problems, cfg):
    """group_scores of every seed and problem: [S, P, 4]."""
    scores = []
    for subject in subjects:
        model, tokenizer = subject.load(cfg)
        attempts = sample_attempts(model, tokenizer, problems, cfg)
        scores.append([group_scores(attempts[p :: len(problems)]) for p in range(len(problems))])
    return torch.tensor(scores)


def score_rows(rows, scores, names):
    """{row: {metric: interval}} of {label: scores}, of differences, and ranges over seeds."""
    shown = {}
    for label, subjects in rows.items():
        shown[label] = intervals(scores[label].mean(0), names)
        if len(subjects) > 1:
            seeds = scores[label].mean(1)  # [S, 4]
            ranges = torch.stack([seeds.mean(0), *seeds.aminmax(dim=0)], 1).tolist()
            shown[f"{label}, {len(subjects)} seeds"] = dict(zip(names, ranges, strict=True))
    for a, b in combinations(rows, 2):
        shown[f"{b} − {a}"] = intervals(scores[b].mean(0) - scores[a].mean(0), names)
    return shown


# ================================================================================ advantages
@torch.no_grad()
def token_log_probs(model, prompt, completion, cfg):
    """log π(y_t | prompt, y_<t) of every token: [T]."""
    states = sd.hidden_states(model, [prompt], [completion])  # [T, H]
    return sd.log_probs(model, states, cfg.temperature)[range(len(completion)), completion].cpu()


def read_contexts(attempts, student, teacher, tokenizer, cfg):
    """{context: attempts with their advantages under it}, for each of cfg.contexts."""
    readings = {}
    own = [token_log_probs(student, a.prompt, a.completion, cfg) for a in attempts]
    for name in cfg.contexts:
        if not sd.CONTEXTS[name] or not (cfg.critic or name in sd.NO_CRITIC):
            continue  # grpo has no context; without a critic there is no critique
        readings[name] = [replace(attempt, condition=name) for attempt in attempts]
        for attempt, student_log_probs in zip(readings[name], own, strict=True):
            sd.give_context(attempt, name, tokenizer, cfg.teacher_thinking)
            if attempt.teacher_prompt:
                told = token_log_probs(teacher, attempt.teacher_prompt, attempt.completion, cfg)
                attempt.advantages = (told - student_log_probs).tolist()
        taught = [attempt for attempt in readings[name] if attempt.teacher_prompt]
        samples = sample(teacher, tokenizer, [(a.problem, a.teacher_prompt) for a in taught], cfg)
        for attempt, answer in zip(taught, samples, strict=True):
            attempt.teacher_right = answer.reward
    return readings


def token_kinds(attempt, judge):
    """[T] token kinds of a wrong attempt (KINDS or PLACES; None outside steps); [] for others."""
    text = attempt.text
    wrong = first_difference(text, attempt.critique or text)
    if attempt.reward or not (judge or wrong):
        return []
    errors = judge(attempt.problem, text) if judge else []

    def kind(at):
        if not judge:
            return PLACES[(at >= wrong.start) + (at >= wrong.end)]
        for step, error in zip(parse_steps(text), errors, strict=True):
            if step.start <= at < step.end:
                if step.name == "answer":
                    return "answer"
                if not error:
                    return "right step"
                return "wrong value" if at in range(*error) else "rest of wrong step"

    starts = accumulate(map(len, attempt.tokens), initial=0)  # [T + 1]
    # a token's kind is that of its last character; one without characters stands before the next
    return [kind(max(start, end - 1)) for start, end in pairwise(starts)]


def metric(attempt, name):
    """Mean A_t of a kind of token, its share of all |A_t| (%), or what `name` says; or NaN."""
    advantages = attempt.advantages
    if name == "teacher right":
        return 100 * attempt.teacher_right
    if name == "pushed down" and attempt.reward and advantages:
        return 100 * fmean(a < -0.5 for a in advantages)
    kind = name.removeprefix("share ")
    here = [a for a, k in zip(advantages, attempt.kinds, strict=False) if k == kind] or [math.nan]
    if name == kind:
        return fmean(here)
    return 100 * sum(map(abs, here)) / (sum(map(abs, advantages)) or math.nan)


def analyse(readings, names, k):
    """{context: {metric: interval}}, over problems: means of k attempts."""
    numbers = {}
    for context, attempts in readings.items():
        values = torch.tensor([[metric(a, name) for name in names] for a in attempts])  # [k * P, Q]
        numbers[context] = intervals(values.unflatten(0, (k, -1)).nanmean(0), names)  # of [P, Q]
    return numbers


def name_unused(numbers):
    """Names the contexts that the teacher does not use, if there are any."""
    right = {name: row["teacher right"] for name, row in numbers.items() if "teacher right" in row}
    chance = right.pop("empty", [-1])[-1]  # the upper end of the interval
    names = [name for name, interval in right.items() if interval[0] <= chance]
    said = "The teacher is right no more often than without a context, if it is given: "
    return said + ", ".join(names) if names else ""


# ================================================================================ tables and page
def cell(interval, decimals):
    if not interval:
        return "–"
    mean, low, high = [f"{number:z.{decimals}f}" for number in interval]  # z: no minus before 0
    return mean if low == high else f"{mean} [{low}, {high}]"


def table(title, columns, rows, decimals=1):
    """The text of a table; rows are {label: {column: [mean, low, high]}}."""
    lines = [["", *(column.removeprefix("share ") for column in columns)]]
    for label, row in rows.items():
        cells = [cell(row.get(column), decimals) for column in columns]
        lines.append([label.replace("runs/", ""), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)
    return f"\n{title}\n{text}\n"


def pick_examples(readings):
    """Wrong attempts at three problems and a right one, under all contexts. Latest error first."""
    columns = zip(*readings.values(), strict=True)
    columns = sorted(columns, key=lambda c: (not c[0].critique, -c[0].feedback.aligned))
    wrong = {}
    for column in columns:
        if not column[0].reward:
            wrong.setdefault(column[0].problem, column)
    return [*wrong.values()][:3] + [column for column in columns if column[0].reward][:1]


def print_example(column):
    """Prints a wrong attempt under every context."""
    problem = column[0].problem
    if column[0].critique and not column[0].reward:
        print(f"problem: {sd.paint(problem.statement)}, right answer: {sd.paint(problem.answer)}")
        print(f"marked if |A_t| >= 1 nat: {sd.paint('change it', -1)}, {sd.paint('keep it', 1)}")
        for a in column:
            print(f"{a.condition}: {''.join(map(sd.paint, a.tokens, a.advantages))}")
            print(f"    teacher sees: {sd.paint(a.context or a.masked or '(nothing)')}")


def escape(text):
    """Text for HTML. Unprintable characters, control and bidi included, become U+FFFD."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))


def colour(n):
    return f"hsl({20 + 277 * n} {75 * (n > 0)}% {35 + 15 * (n % 3)}%)"  # grey for the base


def bars(rows):
    """Stacked bars of {label: [(width in %, colour)]}."""
    text = ""
    for label, parts in rows.items():
        spans = [f'<i style="width:{width:.2f}%;background:{fill}"></i>' for width, fill in parts]
        text += f"<dt>{escape(label)}<dd>{''.join(spans)}"
    return f"<dl>{text}</dl>"


def legend(colours):
    """{label: colour} as coloured labels."""
    marks = [f'<b style="background:{fill}">{escape(name)}</b>' for name, fill in colours.items()]
    return " ".join(marks)


def chart(marks, last, x_label, y_label):
    """An SVG with y from 0 to 100 and x from 0 to last. The marks' x goes from 0 to 180."""
    return f"""<svg class=chart viewBox="0 0 430 250"><g text-anchor=end><text x=44 y=14>100</text>
<text x=44 y=114>50</text><text x=44 y=214>0</text></g>
<g fill=none transform="translate(50 210) scale(2 -2)">
<path d="M0 0h180M0 25h180M0 50h180M0 75h180M0 100h180" stroke="#8886" stroke-width=.5 />{marks}</g>
<g text-anchor=middle><text x=50 y=228>0</text><text x=230 y=228>{last / 2:g}</text>
<text x=410 y=228>{last}</text><text x=230 y=246>{x_label}</text>
<text x=-110 y=14 transform=rotate(-90)>{y_label}</text></g></svg>"""


def charts(rows, averages, contexts):
    """Validation Avg against step, and test Avg against the teacher's accuracy."""
    lines, points = "", ""
    last = max([1, *(max(run.curve) for runs in rows.values() for run in runs if run.cfg)])
    for n, (label, runs) in enumerate(rows.items()):
        name = f"<title>{escape(label)}</title>"
        for curve in [run.curve for run in runs if run.cfg]:
            path = " ".join(f"{180 * step / last:.1f},{avg:.1f}" for step, avg in curve.items())
            lines += f'<polyline points="{path}" stroke="{colour(n)}">{name}</polyline>'
        context = contexts.get(runs[0].cfg.condition if runs[0].cfg else "empty")
        if context:
            x, y = 1.8 * context["teacher right"][0], averages[label][0]
            points += f'<circle cx={x:.1f} cy={y:.1f} r=2 fill="{colour(n)}">{name}</circle>'
    curves = chart(lines, last, "training step", "validation Avg, %")
    return curves + chart(points, 100, "teacher right, %", "test Avg, %")


def example(column):
    """An attempt under each context, tokens coloured by A_t. A switch shows one at a time."""
    rows = ""
    for n, a in enumerate(column):
        tokens, text = "", ""
        starts = {step.start for step in parse_steps(a.text)}  # a new line before each step
        for token, value in zip(a.tokens, a.advantages or [0.0] * len(a.tokens), strict=True):
            hue = "keep" if value > 0 else "change"
            style = f'title="{value:+.2f}" style="--a:{abs(value):.3f};--hue:var(--{hue})"'
            begins = starts & {*range(len(text), len(text) + len(token))}
            if begins and text[-1:] not in ("", "\n"):
                tokens += "\n"
            tokens += f"<span {style}>{escape(token.lstrip(' ') if begins else token)}</span>"
            text += token
        shown = a.context or a.masked or "(nothing)"
        shown = escape(re.sub("> *(?=<(?:step_|answer))", ">\n", shown))
        rows += f"<div class=c{n}><p>Attempt:\n{tokens}</p><p>Teacher sees:\n{shown}</p></div>"
    verdict = "right attempt" if a.reward else f"wrong attempt, right answer: {a.problem.answer}"
    title = f"{a.problem.statement}: {verdict}"
    return f"<h3>{escape(title)}</h3>{rows}"


STYLE = """:root{color-scheme:light dark;--change:light-dark(#e0600a,#f07a28)}
:root{--keep:light-dark(#0072b2,#3aa0e8)} .chart{width:max(49%,min(100%,27rem));font-size:12px}
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:auto;padding:1rem}
polyline{stroke-width:1.25} circle{fill-opacity:.7} h3{margin:1rem 0 0} text{fill:currentColor}
dl{display:grid;grid-template-columns:auto 1fr;gap:.3rem 1rem} dt{text-align:right}
dd{margin:auto 0;display:flex;height:1rem;background:#8882} dd i+i{border-left:2px solid canvas}
p,code{white-space:pre-wrap;overflow-wrap:anywhere}
b{color:#fff;padding:.3rem;display:inline-block}
div{display:none;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:0 1rem}
div p{margin:0} nav{position:sticky;top:0;background:canvas;padding:.5rem 0}
label{white-space:nowrap} pre{overflow-x:auto}
details{margin:1rem 0} summary{font-weight:bold}
em{background:linear-gradient(90deg,var(--change),transparent,var(--keep))}
[title]{background:color-mix(in srgb,var(--hue) calc(80% * sqrt(min(1,var(--a)/5))),transparent)}
[title]:hover::after{content:attr(title);position:absolute;padding:0 .3rem;background:canvas;
border:1px solid;transform:translateY(-1.6rem)}"""


def page(rows, training, numbers, tables, examples, scored):
    contexts, scores, shares = numbers["contexts"], {}, {}
    averages = {label: next(iter(numbers["scores"][label].values())) for label in rows}
    for n, (label, (mean, low, high)) in enumerate(averages.items()):
        parts = [(low, "none"), (mean - low, colour(n)), (high - mean, colour(n))]
        scores[f"{label}: {mean:.1f}"] = parts
    fills = dict(zip(contexts["tokens"], ["#777", "#c2185b", "#9a6a80", "#5e55b8"], strict=False))
    kinds = {kind.removeprefix("share "): fill for kind, fill in fills.items()}
    error = "wrong value" if "wrong value" in kinds else "in wrong step"
    whose = escape(f"attempts of {scored.name if scored.cfg else 'the base'}")
    for name, row in contexts.items() if fills else []:
        label = f"{name}, A_t {row[error][0]:+.1f}" if error in row else name
        shares[label] = [(row[kind][0], fill) for kind, fill in fills.items() if kind in row]
    colours = {label: colour(n) for n, label in enumerate(rows)}
    switch, rules, told = "", "", ""
    names = [a.condition for a in examples[0]]
    trained = [run.cfg.condition for runs in rows.values() for run in runs if run.cfg]
    first = next(name for name in [*trained[::-1], "critique", *names] if name in names)
    for n, name in enumerate(names):
        about = sd.CONTEXTS[name].__doc__ or inspect.getsource(sd.CONTEXTS[name]).strip()
        checked = " checked" * (name == first)
        switch += f"<label><input type=radio name=c id=r{n}{checked}>{escape(name)}</label> "
        rules += f":has(#r{n}:checked) .c{n}{{display:grid}}"
        told += f"<div class=c{n}><code>{escape(about)}</code></div>"
    return f"""<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content="width=device-width">
<title>Self-distillation: {escape(" ".join(sys.argv[1:]))}</title><style>{STYLE}{rules}</style>
<h1>Self-distillation from feedback</h1><p>After Kara &amp; Ersoy, \
<a href="https://arxiv.org/abs/2606.11173">The Role of Feedback Alignment in Self-Distillation</a>.
A student writes an attempt. Its teacher, the same model before training, also sees a context.
Made by <code>{escape(shlex.join(sys.argv))}</code></p>
<h2>Avg on the test problems, from 0 to 100%</h2>{bars(scores)}<p>Avg: share of right attempts. \
Bar: 95% interval. Its line: mean.</p><p>{legend(colours)}</p>{charts(rows, averages, contexts)}
<p>First: a line for each seed, on the validation problems. Second: does a teacher that is right \
more often, with the context in its prompt, teach more? The base has no context.
{escape(training)}</p>
<h2>Where the advantage is: shares of |A_t| in wrong {whose}</h2>
<p>{legend(kinds) or "Unknown: pass --critic."}</p>{bars(shares)}<p>A_t: mean, {error}, in nats \
(negative: change it). tokens: shares of all tokens. The rest is outside the steps. \
{escape(name_unused(contexts))}</p>
<h2>Some {whose}</h2><p>Wrong ones, the latest error first, and a right one, beside what the \
teacher sees. A token's colour is A_t = log π_teacher(token | problem, context) − log \
π_student(token | problem), in nats: <em>change it (−5) … keep it (+5)</em>. Point at a token, or \
tap it, for the value.</p><nav>{switch}{told}</nav>{"".join(map(example, examples))}
<details><summary>Tables</summary><pre>{escape(tables)}</pre></details></html>"""


# ================================================================================ command line
def parse_args(argv):
    parser = argparse.ArgumentParser("eval.py", argparse.SUPPRESS, __doc__.partition("Shapes")[0])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("subjects", nargs="*", help="runs and models to compare")
    parser.add_argument("--k", type=int, default=12, help="attempts at each problem [12]")
    helps = dict.fromkeys(sd.Settings.__annotations__, argparse.SUPPRESS)
    helps["data"] = "test problems: a JSONL file, or a folder with test.jsonl"
    helps["advantages"] = "run or model whose attempts are scored under every context"
    helps["condition"] = "score them under this context, and without one (empty), only"
    helps["html"] = "file for the page, with the base's attempts if without --advantages"
    helps["json"] = "file for all numbers"
    for name, text in helps.items():
        choices = [*sd.CONTEXTS] if name == "condition" else None
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, metavar="X", choices=choices, help=text)
    args = parser.parse_intermixed_args(argv)
    if not (args.subjects or args.advantages):
        parser.error("needs a run or a model; see --help")
    for path in (args.html, args.json):
        if path and Path(path).is_dir():
            parser.error(f"{path} is a folder: choose a file's name")
    return args


def score_contexts(subject, problems, cfg):
    """(numbers, tables, examples) of the subject's attempts under every context, and all tokens."""
    student, tokenizer = subject.load(cfg)
    teacher, _ = sd.load_model(subject.base, cfg.device, cfg.dtype)
    attempts = sample_attempts(student, tokenizer, problems, cfg)
    judge = None
    if cfg.critic:
        sd.ask_critic(attempts, sd.open_critic(cfg, teacher, tokenizer))
        judge = cfg.critic.endswith(".py") and runpy.run_path(cfg.critic).get("judge")
    for attempt in attempts:
        attempt.tokens = sd.token_texts(tokenizer, attempt.completion, attempt.text)
        attempt.kinds = token_kinds(attempt, judge)
    readings = read_contexts(attempts, student, teacher, tokenizer, cfg)
    kinds = KINDS if judge else PLACES
    shares, others = [f"share {kind}" for kind in kinds], ["teacher right", "pushed down"]
    numbers = analyse(readings, [*kinds, *shares, *others], cfg.k)
    ones = [replace(attempt, advantages=[1.0] * len(attempt.kinds)) for attempt in attempts]
    tokens = analyse({"tokens": ones}, shares, cfg.k)  # the kinds' shares of all tokens
    text = table(f"{subject.model}: A_t in wrong attempts, nats", kinds, numbers, decimals=2)
    text += table("share of |A_t| in wrong attempts, %", shares, tokens | numbers)
    title = "teacher right; pushed down: tokens of right attempts with A_t < -0.5; both in %"
    text += table(title, others, numbers)
    means = [f"{n} {mean:.2f}" for n, mean in sd.summarise(attempts).items()]
    text += f"all attempts (meanings: .github/MODELS.md): {', '.join(means)}\n"
    return tokens | numbers, text, pick_examples(readings)


@sd.command_line("eval.py")
def main(argv):
    args = parse_args(argv)
    subjects = [open_subject(name) for name in dict.fromkeys(args.subjects)]
    scored = open_subject(args.advantages or subjects[0].base)
    runs = [subject for subject in subjects if subject.cfg]
    same = {f"{run.cfg.model} on {args.data or run.cfg.data}" for run in runs}
    if len(same) > 1:
        raise UserError(f"cannot compare runs of different --model or --data: {', '.join(same)}")
    explained = args.advantages or args.html
    plain = {"model": scored.base, "condition": "critique" if explained else "grpo", "lr": 1.0}
    settings = [vars(s.cfg) for s in [*runs, scored] if s.cfg] or [plain]
    first = max(settings, key=lambda values: bool(values.get("critic")))  # with a critic, if any
    given = {name: value for name, value in vars(args).items() if value is not None}
    contexts = [args.condition, "empty"] if args.condition else [*sd.CONTEXTS]
    cfg = sd.parse_args([], first | {"seed": 2, "contexts": contexts} | given)
    if args.data and Path(args.data).is_file():
        problems = critic.read_problems(args.data)
    else:
        problems = critic.load_problems(cfg.data)[2]
    if not problems:
        raise UserError(f"{cfg.data} has no problems")
    rows, training = rows_of(subjects), describe_training(runs)
    numbers, tables = {}, ""
    test = f"{len(problems)} problems of {cfg.data}, attempts at each: {cfg.k}"
    print(f"{', '.join(rows or [scored.name])}: sampling {test}")
    if rows:
        scores = {label: measure(row, problems, cfg) for label, row in rows.items()}
        names = [f"Avg@{cfg.k}", f"Maj@{cfg.k}", f"Pass@{cfg.k}", "tokens"]
        numbers = {"scores": score_rows(rows, scores, names), "problems": scores}
        seeds = "; N seeds: lowest, highest" * any(len(row) > 1 for row in rows.values())
        title = f"{test} [95% interval over problems{seeds}]"
        tables = table(title, names, numbers["scores"]) + training
        print(tables)
    if explained:
        numbers["contexts"], text, examples = score_contexts(scored, problems, cfg)
        write(args.html, page(rows, training + test, numbers, tables + text, examples, scored))
        if args.html:
            print(f"advantages: see {args.html}")
        else:
            print_example(examples[0])
            print(text)
        print(name_unused(numbers["contexts"]))
    write(args.json, json.dumps(numbers, default=torch.Tensor.tolist))


if __name__ == "__main__":
    main(sys.argv[1:])
