"""What finished runs show: the paper's table, its per-token analysis, and both on one page.

    python eval.py runs/grpo runs/reference runs/critique           the table, with intervals
    python eval.py --advantages runs/critique                       what every context says of the same tokens
    python eval.py runs/grpo runs/critique --html report.html       both, with learning curves, to be looked at

A model folder or hub id may stand wherever a run does. Runs that differ in their seed only are one row.
Every interval is a 95% bootstrap over problems: the spread that other problems of this kind would show.
Attempts are sampled as sd.py samples them, with the same numbers for the same --seed, and kept.
"""

import argparse, dataclasses, hashlib, html, json, math, sys  # noqa: E401
from dataclasses import dataclass
from itertools import accumulate, combinations, groupby
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import sd
from critic import CALCULATION, PROBLEM, first_difference, judge, parse_steps
from sd import CONTEXTS, Problem, Rollout, Stop

KEPT = Path("runs/eval")  # sampled attempts, to be used again
PLACES = ("before", "in", "after")  # the first wrong step
KINDS = ("right step", "wrong value", "rest of wrong step", "answer")  # where steps can be checked
TOKENS = ("solver_tokens", "teacher_tokens", "critic_tokens")
METRICS = {"pass": "Pass@{}", "maj": "Maj@{}", "avg": "Avg@{}", "length": "tokens"}


# ================================================================================ what is compared
@dataclass(frozen=True)
class Subject:
    name: str  # as on the command line
    model: str  # folder or hub id of its weights: of a run, the best checkpoint
    base: str  # the model it was trained from, which is also its teacher; of a plain model, itself
    cfg: sd.Config | None = None  # of a run: its settings
    curve: tuple = ()  # of a run: ({"step", "rollouts", "tokens": all read or written so far}, validation Avg)
    cost: tuple = ()  # of a run: rollouts, each of TOKENS, seconds


def open_subject(name: str) -> Subject:
    """A run's folder, a model's folder, or a hub id. Raises Stop if it is a folder and neither of both."""
    folder = Path(name)
    if not folder.exists():
        return Subject(name, name, name)  # a hub id, or nothing: loading it will tell
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        metrics = [json.loads(line) for line in lines if line.endswith("\n")]  # a last line may be half-written
    except FileNotFoundError as error:
        if Path(error.filename).name == "config.json":
            raise Stop(f"{name} is neither a run's folder nor a model's: it has no config.json") from None
        return Subject(name, name, name)
    except (ValueError, OSError) as error:
        raise Stop(f"{name}: config.json or metrics.jsonl cannot be read: {error}") from None
    if not (folder / "best").is_dir():
        raise Stop(f"{name} has no checkpoint yet, not even its first: let it run a little longer")
    seconds = math.nan
    if (folder / "result.json").exists():
        seconds = json.loads((folder / "result.json").read_text(encoding="utf-8"))["train_seconds"]
    else:
        last = metrics[-1]["step"] if metrics else 0
        print(f"{name} never finished (step {last} of {settings['steps']}): its best checkpoint so far is taken")
    known = {f.name for f in dataclasses.fields(sd.Config)}
    cfg = sd.Config(**{key: value for key, value in settings.items() if key in known})
    curve, rollouts, tokens = [], 0, dict.fromkeys(TOKENS, 0)
    for line in metrics:
        rollouts = line["step"] * cfg.problems_per_step * cfg.group_size
        tokens = {kind: count + line.get(kind, 0) for kind, count in tokens.items()}
        if "val_avg" in line:
            curve.append(({"step": line["step"], "rollouts": rollouts, "tokens": sum(tokens.values())}, line["val_avg"]))
    cost = (rollouts, *tokens.values(), seconds)
    return Subject(name, str(folder / "best"), settings["base_model"], cfg, tuple(curve), cost)


def rows_of(subjects: list[Subject]) -> dict[str, list[Subject]]:
    """{label: subjects}: the bases first, then each run or model; seeds of one recipe share a row."""
    bases = list(dict.fromkeys(s.base for s in subjects if s.cfg))
    rows = {"base" if len(bases) == 1 else f"base {base}": [Subject(base, base, base)] for base in bases}
    recipes = {}
    for subject in subjects:
        if subject.cfg:
            recipe = dataclasses.replace(subject.cfg, seed=0, out="", resume=False, device="")
            recipes.setdefault((recipe, subject.base), []).append(subject)
        elif subject.model not in bases:
            rows[subject.name] = [subject]
    for (recipe, _), members in recipes.items():
        label = recipe.condition
        rows[label if label not in rows else f"{label} ({members[0].name})"] = members
    return rows


# ================================================================================ sampling
def sample_or_recall(model_name: str, problems: list[Problem], k: int, seed: int, cfg) -> list[list[Rollout]]:
    """k graded rollouts of each problem, [problems][k]: sampled, or read back where the same were before."""
    weights = sorted(Path(model_name).glob("*.safetensors"))  # trained anew into the same folder: sampled anew
    key = [model_name, [(w.stat().st_size, w.stat().st_mtime_ns) for w in weights], k, seed]
    key += [[p.problem for p in problems], cfg.temperature, cfg.max_new_tokens, cfg.gen_batch, cfg.device, sd.SOLVE]
    file = KEPT / (hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16] + ".json")
    if file.exists():
        groups = []
        for problem, rows in zip(problems, json.loads(file.read_text(encoding="utf-8"))):
            rewards = [float(sd.is_correct(text, problem.answer)) for _, _, text in rows]
            groups.append([Rollout(problem, *row, reward, 0.0) for row, reward in zip(rows, rewards)])
        return groups
    model, tokenizer = sd.load(model_name, cfg.device)
    groups = sd.evaluate(model, tokenizer, problems, k, seed, cfg, f"sampling {model_name}")
    KEPT.mkdir(parents=True, exist_ok=True)
    with sd.replacing(file) as new:
        rows = [[[r.prompt, r.completion, r.text] for r in group] for group in groups]
        new.write_text(json.dumps(rows), encoding="utf-8")
    return groups


# ================================================================================ numbers
def bootstrap(numerators, denominators=None, draws: int = 10_000) -> torch.Tensor:
    """Σ numerators / Σ denominators over the P problems, and over bootstrap samples: [P], [P] -> [1 + draws].

    A sample is P problems drawn with replacement, the same ones in every call. Without denominators: means.
    """
    top = torch.as_tensor(numerators, dtype=torch.float64)
    bottom = torch.ones_like(top) if denominators is None else torch.as_tensor(denominators, dtype=torch.float64)
    drawn = torch.randint(len(top), (draws, len(top)), generator=torch.Generator().manual_seed(0))  # [draws, P]
    drawn = torch.cat([torch.arange(len(top))[None], drawn])  # first the problems as they are
    return top[drawn].sum(-1) / bottom[drawn].sum(-1)


def interval(ratios: torch.Tensor) -> tuple[float, float, float]:
    """(estimate, 2.5th, 97.5th percentile) of what `bootstrap` returns; NaN where it is 0 / 0."""
    low, high = ratios[1:].nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return ratios[0].item(), low, high


def measure(rows: dict[str, list[Subject]], problems, k: int, seed: int, cfg) -> dict:
    """{label: {metric: {"mean", "low", "high", "seeds": each seed's mean, "problems": [P], the mean over seeds}}}."""
    measured = {}
    for label, subjects in rows.items():
        seeds = []  # [seeds][problems] -> {metric: value}
        for subject in subjects:
            groups = sample_or_recall(subject.model, problems, k, seed, cfg)
            seeds.append([sd.summarise([group]) for group in groups])
        measured[label] = {}
        for metric in METRICS:
            values = torch.tensor([[problem[metric] for problem in run] for run in seeds], dtype=torch.float64)
            mean, low, high = interval(bootstrap(values.mean(0)))
            each = {"seeds": values.mean(1).tolist(), "problems": values.mean(0).tolist()}
            measured[label][metric] = {"mean": mean, "low": low, "high": high} | each
    return measured


def differences(measured: dict) -> dict[str, tuple[float, float, float]]:
    """{"b − a": (mean, low, high)} of Avg@k, problem by problem, for each pair of rows."""
    pairs = {}
    for a, b in combinations(measured, 2):
        first, second = (torch.tensor(measured[row]["avg"]["problems"], dtype=torch.float64) for row in (a, b))
        pairs[f"{b} − {a}"] = interval(bootstrap(second - first))
    return pairs


# ================================================================================ per-token advantage
@torch.no_grad()
def token_log_probs(model, prompts, completions, cfg) -> torch.Tensor:
    """log π(y_t | prompt, y_<t) of every completion token at the sampling temperature: [N], in nats."""
    states = sd.completion_states(model, prompts, completions)
    tokens = torch.tensor([t for c in completions for t in c], device=model.device)
    chunks = zip(states.split(cfg.chunk), tokens.split(cfg.chunk))
    return torch.cat([sd.log_probs(model, s, cfg.temperature).gather(-1, t[:, None]).squeeze(-1) for s, t in chunks])


def score(rollouts: list[Rollout], student, teacher, tokenizer, ask, cfg) -> dict[str, list[list[float] | None]]:
    """{context: A_t of each rollout's tokens}: the same tokens under every context that has a teacher.

    A_t as in sd.py. None where a rollout has no such context. Fills in the rollouts' critiques.
    """
    given = {}
    for name in CONTEXTS:
        copies = [dataclasses.replace(r) for r in rollouts]
        if ask or name in sd.WITHOUT_CRITIC:
            sd.give_contexts(copies, ask, teacher, tokenizer, dataclasses.replace(cfg, condition=name))
        if any(r.teacher_prompt is not None for r in copies):
            given[name] = copies
    if ask:
        sd.ask_critic(rollouts, ask, tokenizer)
    advantages = {name: [None] * len(rollouts) for name in given}
    for start in tqdm(range(0, len(rollouts), cfg.micro_batch), "scoring", leave=False):
        batch = range(start, min(start + cfg.micro_batch, len(rollouts)))
        completions = [rollouts[i].completion for i in batch]
        own = token_log_probs(student, [rollouts[i].prompt for i in batch], completions, cfg)
        own = dict(zip(batch, own.split([len(c) for c in completions])))
        for name, copies in given.items():
            taught = [i for i in batch if copies[i].teacher_prompt is not None]
            if taught:
                completions = [rollouts[i].completion for i in taught]
                told = token_log_probs(teacher, [copies[i].teacher_prompt for i in taught], completions, cfg)
                for i, values in zip(taught, told.split([len(c) for c in completions])):
                    advantages[name][i] = (values - own[i]).tolist()
    return advantages


def places(rollout: Rollout, tokenizer) -> tuple[list[str], list[str], list[str]]:
    """Where each token stands: (texts, "before" / "in" / "after" the first wrong step, kind of step), each [T].

    The first wrong step is the first that the critique does not repeat; with none, every place is
    "before". The kind, where steps can be checked (the embedded task): "right step", "wrong value",
    "rest of wrong step", "answer"; else, and outside of all steps, "".
    """
    texts = sd.token_texts(tokenizer, rollout.completion)
    starts = list(accumulate(map(len, texts), initial=0))[:-1]
    wrong = first_difference(rollout.text, rollout.critique) if rollout.critique is not None else None
    begin, end = (wrong.start, wrong.end) if wrong else (math.inf, math.inf)
    around = ["before" if at < begin else "in" if at < end else "after" for at in starts]
    kinds = [""] * len(texts)
    if PROBLEM.fullmatch(rollout.problem.problem):
        for step, right in zip(parse_steps(rollout.text), judge(rollout.text)):
            value = step.end - len(f"</{step.name}>") - 1 if CALCULATION.fullmatch(step.text) else None
            kind = "answer" if step.name == "answer" else "right step" if right else "rest of wrong step"
            for t, at in enumerate(starts):
                if step.start <= at < step.end:
                    kinds[t] = "wrong value" if at == value and kind == "rest of wrong step" else kind
    return texts, around, kinds


def analyse(groups: list[list[Rollout]], advantages: dict, located: list[tuple]) -> dict:
    """{context: {quantity: (mean, low, high)}}; "tokens" has each place's share of the tokens, and
    "critique − reference" the differences, attempt by attempt.

    groups: [problems][k]; advantages and located: of all rollouts in that order. Of wrong attempts
    with a known first wrong step: "A before", "|A| before", "share before" (of all |A_t|), and so on,
    and "share right step" and the other kinds. Of right attempts: "mean A_t", "pushed down".
    """
    problem_of = [p for p, group in enumerate(groups) for _ in group]
    rollouts = [r for group in groups for r in group]
    sums = {}  # (context, quantity) -> [numerators, denominators], each [P]

    def add(context, quantity, problem, numerator, denominator):
        entry = sums.setdefault((context, quantity), torch.zeros(2, len(groups), dtype=torch.float64))
        entry[:, problem] += torch.tensor([numerator, denominator], dtype=torch.float64)

    for i, (rollout, problem, (_, around, kinds)) in enumerate(zip(rollouts, problem_of, located)):
        for context in ["tokens", *advantages]:
            values = [1.0] * len(around) if context == "tokens" else advantages[context][i]
            if values is None or not (rollout.reward or "in" in around):
                continue
            sizes = [abs(a) for a in values]
            if rollout.reward:
                add(context, "mean A_t", problem, sum(values), len(values))
                add(context, "pushed down", problem, 100 * sum(a < -0.5 for a in values), len(values))
                continue
            kinds_known = KINDS if any(kinds) else ()
            for where, labels in [(w, around) for w in PLACES] + [(w, kinds) for w in kinds_known]:
                here = [t for t, label in enumerate(labels) if label == where]
                size = sum(sizes[t] for t in here)
                add(context, f"A {where}", problem, sum(values[t] for t in here), len(here))
                add(context, f"|A| {where}", problem, size, len(here))
                add(context, f"share {where}", problem, 100 * size, sum(sizes))
    ratios, result = {key: bootstrap(*entry) for key, entry in sums.items()}, {}
    for context, quantity in list(ratios):
        if context == "critique" and ("reference", quantity) in ratios:
            difference = ratios[context, quantity] - ratios["reference", quantity]
            ratios["critique − reference", quantity] = difference
    for (context, quantity), values in ratios.items():
        result.setdefault(context, {})[quantity] = interval(values)
    return result


# ================================================================================ tables
@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]


def cell(numbers: tuple[float, float, float], digits: int = 1) -> str:
    mean, low, high = numbers
    return "–" if math.isnan(mean) else f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def result_tables(measured: dict, k: int, problems: int) -> list[Table]:
    rows = []
    for label, row in measured.items():
        rows.append([label] + [cell((row[m]["mean"], row[m]["low"], row[m]["high"])) for m in METRICS])
        if (seeds := len(row["avg"]["seeds"])) > 1:
            spread = [f"{min(row[m]['seeds']):.1f} to {max(row[m]['seeds']):.1f}" for m in METRICS]
            rows.append([f"  its {seeds} seeds", *spread])
    header = [""] + [name.format(k) for name in METRICS.values()]
    pairs = [[name, cell(numbers)] for name, numbers in differences(measured).items()]
    return [
        Table(f"{problems} test problems, {k} samples each [95% interval over problems]", header, rows),
        Table("differences, problem by problem", ["", f"Avg@{k}"], pairs),
    ]


def cost_table(rows: dict[str, list[Subject]]) -> Table:
    costs = {label: [s.cost for s in subjects if s.cost] for label, subjects in rows.items()}
    means = {label: [sum(column) / len(column) for column in zip(*runs)] for label, runs in costs.items() if runs}
    cells = [[label, *("–" if math.isnan(n) else f"{n:,.0f}" for n in mean)] for label, mean in means.items()]
    title = "what training took, mean of the seeds; tokens are read or written"
    return Table(title, ["", "rollouts", "solver's tokens", "teacher's", "critic's", "seconds"], cells)


def advantage_tables(result: dict) -> list[Table]:
    def table(title, quantities, digits, with_tokens=False):
        contexts = [c for c in result if with_tokens or c != "tokens"]
        quantities = [q for q in quantities if any(q in row for row in result.values())]
        names = [q.split(" ", 1)[1] if q[0] in "A|" or q.startswith("share") else q for q in quantities]
        nothing = (math.nan,) * 3
        rows = [[c] + [cell(result[c].get(q, nothing), digits) for q in quantities] for c in contexts]
        return Table(title, ["", *names], rows)

    tables = [
        table("wrong attempts: A_t around the first wrong step, nats", [f"A {w}" for w in PLACES], 2),
        table("wrong attempts: A_t by kind of token, nats", [f"A {w}" for w in KINDS], 2),
        table("wrong attempts: |A_t|", [f"|A| {w}" for w in PLACES], 2),
        table("wrong attempts: share of all |A_t|, percent", [f"share {w}" for w in PLACES], 1, True),
        table("wrong attempts: the same share by kind of token", [f"share {w}" for w in KINDS], 1, True),
        table("right attempts: A_t, and the percentage of tokens with A_t < -0.5", ["mean A_t", "pushed down"], 2),
    ]
    return [t for t in tables if len(t.header) > 1]  # by kind of token only where steps can be checked


def summary_table(rows: dict[str, list[Subject]], results: dict, advantages: dict, k: int) -> Table:
    """Of each context that was trained with: what it came to, and what it said of the attempts that were scored.

    Validation is there too, from the first to the last: of a context that does harm the best checkpoint is the base.
    """
    wrong, right = ("wrong value", "right step") if "A wrong value" in advantages.get("tokens", {}) else ("in", "before")
    columns = {
        f"A_t {wrong}": f"A {wrong}", f"A_t {right}": f"A {right}",
        f"% of |A_t| {wrong}": f"share {wrong}", "right attempts pushed down, %": "pushed down",
    }  # fmt: skip
    table, nothing = [], (math.nan,) * 3
    for context in [c for c in advantages if c in results]:
        average, curves = results[context]["avg"], [s.curve for s in rows[context] if s.curve]
        ends = [sum(curve[at][1] for curve in curves) / max(len(curves), 1) for at in (0, -1)]
        row = [context, cell((average["mean"], average["low"], average["high"])), "{:.1f} to {:.1f}".format(*ends)]
        for quantity in columns.values():
            row.append(cell(advantages[context].get(quantity, nothing), 2 if quantity.startswith("A") else 1))
        table.append(row)
    title = "what training with each context came to, and what it says of the attempts scored"
    return Table(title, ["", f"Avg@{k}", "validation", *columns], table)


def as_text(table: Table) -> str:
    lines = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["", table.title]
    for name, *cells in lines:
        text.append("  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))]))
    return "\n".join(text)


def as_html(table: Table) -> str:
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class=wide><table><caption>{escape(table.title)}</caption><tr>{head}</tr>{body}</table></div>"


# ================================================================================ the page
def escape(text: str) -> str:
    """Text for HTML and SVG. What cannot be printed, control and bidirectional characters too, shows as U+FFFD."""
    text = text.replace("\n", "⏎").replace("\t", " ")
    return html.escape("".join(c if c.isprintable() else "\ufffd" for c in text))


LINES = (("#0072b2", ""), ("#d55e00", "7 3"), ("#009e73", "2 3"), ("#cc79a7", "9 3 2 3"))  # colour, dashes


def curve_chart(rows: dict[str, list[Subject]], x_label: str) -> str:
    """An SVG of validation Avg against "step", "rollouts" or "tokens": mean over seeds, lowest to highest as a band."""
    series = {}
    for label, subjects in rows.items():
        curves = [s.curve for s in subjects if s.curve]
        for points in zip(*curves):  # of every seed at one step
            x = sum(spent[x_label] for spent, _ in points) / len(points)
            series.setdefault(label, []).append((x, [value for _, value in points]))
    return line_chart(series, "validation Avg", x_label)


def line_chart(series: dict[str, list[tuple]], y_label: str, x_label: str) -> str:
    """An SVG of {label: [(x, [percentages])]}: a line through the means, a band from the lowest to the highest."""
    right = max([x for points in series.values() for x, _ in points] + [1])
    tick = 10 ** math.floor(math.log10(right))
    tick = next(t for t in (5 * tick, 2 * tick, tick, tick / 2, tick / 5) if right / t >= 3)
    unit, k = (1000, "k") if right >= 1e5 else (1, "")
    digits = 1 if tick < 1 else 0
    at_x, at_y = (lambda x: 40 + 290 * x / right), (lambda y: 220 - 2.05 * y)
    parts = []
    for y in range(0, 101, 20):
        parts.append(f'<path d="M40 {at_y(y)}H330" stroke="currentColor" stroke-opacity=".18"/>')
        parts.append(f'<text x="34" y="{at_y(y) + 4}" text-anchor="end">{y}</text>')
    for n in range(int(right / tick) + 1):
        parts.append(f'<text x="{at_x(n * tick):.1f}" y="238" text-anchor="middle">{n * tick / unit:,.{digits}f}{k}</text>')
    parts.append(f'<text x="185" y="258" text-anchor="middle">{escape(x_label)}</text>')
    names = []  # (x and y of the line's end, label)
    for (label, points), (colour, dashes) in zip(series.items(), LINES * len(series)):
        middle = [(at_x(x), at_y(sum(ys) / len(ys))) for x, ys in points]
        band = [(at_x(x), at_y(max(ys))) for x, ys in points]
        band += [(at_x(x), at_y(min(ys))) for x, ys in reversed(points)]
        corners = [" ".join(f"{x:.1f},{y:.1f}" for x, y in line) for line in (band, middle)]
        parts.append(f'<polygon points="{corners[0]}" fill="{colour}" fill-opacity=".15"/>')
        line = f'stroke="{colour}" stroke-width="2.2" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline points="{corners[1]}" fill="none" {line}/>')
        for (x, y), (_, ys) in zip(middle, points):
            value = f"<title>{escape(label)}: {sum(ys) / len(ys):.1f}</title>"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}">{value}</circle>')
        names.append((*middle[-1], label))
    lowest = -math.inf
    for x, y, label in sorted(names, key=lambda name: name[1]):
        lowest = max(y + 4, lowest + 14)  # labels do not overlap
        halo = 'stroke="Canvas" stroke-width="4" stroke-linejoin="round" paint-order="stroke"'  # above a curve that goes on
        parts.append(f'<text x="{x + 8:.1f}" y="{lowest:.1f}" font-weight="600" {halo}>{escape(label)}</text>')
    return svg(430, 264, f"{y_label} against {x_label}", parts)


def svg(width: float, height: float, title: str, parts: list[str]) -> str:
    font = 'font-family="system-ui,sans-serif" font-size="12" fill="currentColor"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" {font}>'
    return f"{head}<title>{escape(title)}</title>{''.join(parts)}</svg>"


def colour(advantage: float) -> str:
    """Blue keeps the token, orange changes it; full strength from 5 nats on. The page shows through: light or dark.

    By the root of |A_t|, or the half nat by which a teacher's other phrasing pushes a token down is not seen.
    """
    fill = "#0072b2" if advantage > 0 else "#e0600a"
    return f'fill="{fill}" fill-opacity="{0.75 * math.sqrt(min(abs(advantage) / 5, 1)):.3f}"'


def heat_map(texts: list[str], around: list[str], advantages: dict[str, list[float]]) -> str:
    """An SVG: the attempt once for each context, its tokens coloured by A_t, the value on hover.

    A line holds 44 characters, and is drawn for every context before the next begins. The first
    wrong step has a bar above it.
    """
    columns, unit = 44, 7.6
    pieces, line, column = [], 0, 0  # (line, column, text, token's index)
    for t, text in enumerate(texts):
        for piece in [text[i : i + columns] for i in range(0, len(text), columns)]:  # a token may be longer than a line
            if column + len(piece) > columns:
                line, column = line + 1, 0
            pieces.append((line, column, piece, t))
            column += len(piece)
    row_height, gap = 19, 14
    block = row_height * len(advantages) + gap
    parts = []
    for n in range(line + 1):
        for row, name in enumerate(advantages):
            y = n * block + gap + row * row_height + 13
            parts.append(f'<text x="0" y="{y}">{escape(name)}</text>')
    mono = 'font-family="ui-monospace,Menlo,Consolas,monospace"'
    for line_number, column, piece, t in pieces:
        x, width = 72 + column * unit, len(piece) * unit
        if around[t] == "in":
            y = line_number * block + gap - 5
            bar = f'<path d="M{x:.1f} {y}h{width:.1f}" stroke="currentColor" stroke-width="3">'
            parts.append(f"{bar}<title>first wrong step</title></path>")
        for row, values in enumerate(advantages.values()):
            y = line_number * block + gap + row * row_height
            hover = f"<title>{escape(texts[t])}  {values[t]:+.2f}</title>"
            box = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{row_height - 2}" {colour(values[t])}/>'
            at = f'x="{x:.1f}" y="{y + 13}" textLength="{width:.1f}" lengthAdjust="spacingAndGlyphs"'
            parts.append(f'<g>{hover}{box}<text {at} {mono} xml:space="preserve">{escape(piece)}</text></g>')
    return svg(72 + columns * unit, (line + 1) * block + 4, "advantage of each token under each context", parts)


SCALE = [(72 + 26 * n, n - 5) for n in range(11)]  # (x, advantage) of the legend's boxes
LEGEND = svg(430, 32, "legend", [
    *(f'<rect x="{x}" y="0" width="26" height="14" {colour(a)} stroke="currentColor" stroke-opacity=".15"/>' for x, a in SCALE),
    *(f'<text x="{x + 13}" y="28" text-anchor="middle">{a:+d}</text>' for x, a in SCALE[::5]),
    '<text x="0" y="12">change it</text><text x="366" y="12">keep it</text>',
])  # fmt: skip

STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:auto;padding:1rem}
figure{margin:1.5rem 0;break-inside:avoid}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(22rem,100%),1fr));gap:1rem 2rem}.pair>*{min-width:0}
svg{width:100%;height:auto;max-width:34rem;display:block}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1rem 0}
caption{text-align:left;font-weight:600;white-space:nowrap}td,th{padding:.15rem .8rem .15rem 0;white-space:pre;text-align:right}
td:first-child{text-align:left}tr{border-bottom:1px solid #8884}
code{overflow-wrap:anywhere}dt{font-weight:600}dd{margin:0 0 .6rem}
@media(max-width:30rem){body{font-size:15px}}
"""


def example(rollout: Rollout, located: tuple, advantages: dict[str, list[float]]) -> str:
    texts, around, _ = located
    grade = "right" if rollout.reward else "wrong"
    aside = {"the critique": rollout.critique or "none: the critic failed", "the reference": rollout.problem.solution}
    aside = "".join(f"<dt>{name}</dt><dd><code>{escape(text)}</code></dd>" for name, text in aside.items())
    title = f"{escape(rollout.problem.problem)} answered {grade}; the answer is {escape(rollout.problem.answer)}"
    both = f"<div class=pair>{heat_map(texts, around, advantages)}<dl>{aside}</dl></div>"
    return f"<figure><figcaption><b>{title}</b></figcaption>{both}</figure>"


def page(tables: list[Table], rows: dict, advantage: list[Table], examples: list[str], of: str, command: str) -> str:
    curves = [curve_chart(rows, x) for x in ("step", "rollouts", "tokens")]
    return f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>Self-distillation from feedback</title><style>{STYLE}</style>
<h1>Self-distillation from feedback</h1>
<p>A model learns from itself: a frozen copy with a context in its prompt says at every token of an attempt what it
would have written. What the context is makes the difference.</p>
<h2>Results</h2>{"".join(map(as_html, tables))}
<h2>Learning curves</h2><p>Avg on the validation problems, mean of the seeds; the band is from the lowest
to the highest. Against steps, against attempts sampled, and against all tokens that solver, teacher and critic read or wrote.</p>
<div class=pair>{"".join(curves)}</div>
<h2>What each context says of the same tokens</h2>
<p>A<sub>t</sub> = log π(token | problem, context) of the teacher − log π(token | problem) of {escape(of)}, in nats.
Below zero the context says: change this token. The first wrong step has a bar above it; a value shows when pointed at.</p>
{LEGEND}{"".join(examples)}
{"".join(map(as_html, advantage))}
<p><small>Made by <code>{escape(command)}</code>. Brackets are 95% bootstrap intervals over problems.</small></p></html>
"""


# ================================================================================ command line
OVERRIDES = ("temperature", "max_new_tokens", "gen_batch", "micro_batch")


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)

    def refuse(message):
        raise Stop(f"{message} (see --help)")

    parser.error = refuse
    parser.add_argument("subjects", nargs="*", metavar="RUN_OR_MODEL", help="run folders, model folders or hub ids")
    parser.add_argument("--advantages", metavar="RUN_OR_MODEL", help="score its attempts under every context")
    parser.add_argument("--html", metavar="FILE", help="write the page; its attempts: --advantages, or else the base's")
    parser.add_argument("--json", metavar="FILE", help="write every number")
    parser.add_argument("--data", metavar="FILE", default="", help="problems to test on, instead of the runs' own")
    parser.add_argument("--keep-band", nargs=2, type=float, metavar=("LOW", "HIGH"), help="of --data, keep what the "
                        "one model solves in this share of attempts, such as 0.05 0.35")  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="where to write what --keep-band keeps")
    parser.add_argument("--k", type=int, default=12, help="attempts at each problem (12)")
    parser.add_argument("--seed", type=int, default=sd.TEST_SEED, help="of sampling (%(default)s, as in sd.py)")
    for name in (*OVERRIDES, "device"):
        kind = type(getattr(sd.Config, name))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="instead of the first run's")
    args = parser.parse_args(argv)
    if not args.subjects and not args.advantages:
        raise Stop("nothing to evaluate: name runs or models, or use --advantages (see --help)")
    if args.keep_band and not (args.data and args.out and len(args.subjects) == 1):
        raise Stop("--keep-band needs one model, and its problems and where to write them: --data FILE --out FILE")
    if args.k < 1:
        raise Stop(f"--k is {args.k}: it must be at least 1")
    return args


def settings(subjects: list[Subject], args) -> sd.Config:
    """How everything in one table is sampled: as the first run, but for what the command line says."""
    cfg = next((s.cfg for s in subjects if s.cfg), sd.Config())
    given = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    return sd.settled(dataclasses.replace(cfg, **given, device=args.device or ""))


def keep_band(problems: list[Problem], averages: list[float], args) -> None:
    """Writes the problems that the model solves now and then: hard for it, but not out of reach."""
    low, high = (100 * share for share in args.keep_band)
    kept = [dataclasses.asdict(p) for p, average in zip(problems, averages) if low <= average <= high]
    with sd.replacing(Path(args.out)) as new:
        new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    print(f"\n{len(kept)} of {len(problems)} problems, solved in {low:g}% to {high:g}% of attempts, are in {args.out}")


def report(args, command: str) -> None:
    subjects = [open_subject(name) for name in args.subjects]
    scored = open_subject(args.advantages) if args.advantages else None
    everything = subjects + ([scored] if scored else [])
    cfg = settings(everything, args)
    tasks = {(s.cfg.data, s.cfg.val_data, s.cfg.test_data) for s in everything if s.cfg}
    if len(tasks) > 1 and not args.data:
        raise Stop("these runs were trained on different problems: give the ones to test on with --data")
    problems = sd.read_problems(args.data) if args.data else sd.problem_sets(cfg)[2]
    rows, numbers, tables = rows_of(subjects), {}, []
    if subjects:
        numbers["results"] = measure(rows, problems, args.k, args.seed, cfg)
        numbers["differences"] = differences(numbers["results"])
        tables = result_tables(numbers["results"], args.k, len(problems))
        tables += [cost_table(rows)] if any(s.cost for s in subjects) else []
        print(*map(as_text, tables), sep="\n")
    if args.keep_band:
        *_, one = numbers["results"].values()
        keep_band(problems, one["avg"]["problems"], args)
    if scored or args.html:
        one = scored or Subject(subjects[0].base, subjects[0].base, subjects[0].base)
        groups = sample_or_recall(one.model, problems, args.k, args.seed, cfg)
        (student, tokenizer), (teacher, _) = (sd.load(name, cfg.device) for name in (one.model, one.base))
        rollouts = [r for group in groups for r in group]
        no_critic = cfg.critic == "scribe" and (args.data or cfg.data)
        ask = None if no_critic else sd.open_critic(cfg, one.base, teacher, tokenizer)
        advantages = score(rollouts, student, teacher, tokenizer, ask, cfg)
        located = [places(r, tokenizer) for r in rollouts]
        numbers["advantages"] = analyse(groups, advantages, located)
        advantage = advantage_tables(numbers["advantages"])
        if any(context in numbers["advantages"] for context in rows):
            advantage.append(summary_table(rows, numbers["results"], numbers["advantages"], args.k))
        print(*map(as_text, advantage), sep="\n")
    if args.html:
        pick = [i for i in range(0, len(rollouts), args.k) if not rollouts[i].reward and "in" in located[i][1]][:3]
        pick += [i for i in range(0, len(rollouts), args.k) if rollouts[i].reward][:2]
        shown = [{c: values[i] for c, values in advantages.items() if values[i]} for i in pick]
        examples = [example(rollouts[i], located[i], values) for i, values in zip(pick, shown)]
        with sd.replacing(Path(args.html)) as new:
            new.write_text(page(tables, rows, advantage, examples, one.name, command), encoding="utf-8")
        print(f"\n{args.html} is written")
    if args.json:
        with sd.replacing(Path(args.json)) as new:
            new.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def main(argv=None) -> None:
    sys.stdout.reconfigure(errors="replace")
    transformers.utils.logging.disable_progress_bar()
    try:
        args = parse_args(argv)
        report(args, " ".join(["python eval.py", *(sys.argv[1:] if argv is None else argv)]))
    except Stop as stop:
        print(f"eval.py: {stop}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"eval.py: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\neval.py: interrupted; what was sampled is kept", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
