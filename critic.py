"""Problems, step-tagged text, answers compared by value, and critics. Independent of training.

A critic writes a corrected version of an attempt. It is a rule from a Python file, a local model
or a server. Each is an ask(rollouts, messages) -> [Critique].
"""

import hashlib
import json
import os
import random
import re
import runpy
import time
import unicodedata
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path

from huggingface_hub import get_session
from tqdm import tqdm


class UserError(Exception):
    """Ends the program with one clear line and exit status 2."""


@contextmanager
def atomic_write(path):
    """Atomic write: yields a temporary file, renamed to the path if the block succeeds."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(f"{path}.{os.urandom(4).hex()}.new")  # processes share the caches
    try:
        with open(new, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


# ================================================================================ problems
@dataclass(frozen=True)
class Problem:
    statement: str  # "problem" in the JSONL files
    solution: str  # the reference solution
    answer: str


def read_problems(path):
    """The problems of a JSONL file, one object a line. Raises UserError with file and line."""
    problems = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            for name in ("problem", "solution", "answer"):
                text = row.get(name)
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"{name} must be a string with text, got {text!r}")
                text.encode()  # a lone surrogate would break a tokenizer
        except Exception as error:  # json raises many types
            said = f"{path}, line {number}: expected problem, solution and answer: {error}"
            raise UserError(said) from None
        problems.append(Problem(row["problem"], row["solution"], row["answer"]))
    return problems


def load_problems(path):
    """[train, validation, test] problems of a folder, or of one JSONL file that is split."""
    if Path(path).is_dir():
        sets = [read_problems(f"{path}/{name}.jsonl") for name in ("train", "val", "test")]
    else:
        problems = read_problems(path)
        random.Random(0).shuffle(problems)
        test = min(len(problems) // 5, 100)
        val = test + min(len(problems) // 10, 50)
        sets = [problems[val:], problems[test:val], problems[:test]]
    if not all(sets):
        raise UserError(f"{path}: too few problems for train, val and test; a single file needs 10")
    text, count = Counter(p.statement for problems in sets for p in problems).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: duplicate problem, {count} times: {text[:60]!r}")
    return sets


# ================================================================================ step-tagged text
# Not one regex: `<step_(\d+)>(.*?)</step_\1>` takes quadratic time if no tag is ever closed.
TAG = re.compile(r"<(/?)(step_[0-9]{1,4}|answer)>")
GAP = re.compile(r"\s*(?=\S)")  # white space that text follows
# Group 1 leaves out thinking: all up to the last </think>, and all from an unclosed <think> on.
SPOKEN = re.compile(r"(?:.*</think>)?(.*?)(?:<think>|\Z)", re.DOTALL)


@dataclass
class Step:
    name: str  # "step_1", "step_2", … or "answer"
    text: str  # what stands between the tags
    source: str  # the same with its tags: attempt[start:end]
    start: int
    end: int

    @property
    def title(self):
        return self.name.replace("_", " ").capitalize()  # "Step 1"

    def repeats(self, other):
        """Word for word. White space may differ."""
        return self.name == other.name and self.text.split() == other.text.split()


def parse_steps(attempt):
    """The steps and answers in order. The next tag ends a step; only </answer> ends an answer."""
    spoken, steps = SPOKEN.match(attempt), []
    # models miscount and forget: <step_3>...</step_4> and <step_3>...<step_4> are step 3
    for tag, after in pairwise(TAG.finditer(attempt, spoken.start(1), spoken.end(1))):
        if not tag[1] and (tag[2] != "answer" or after[0] == "</answer>"):
            start, end = tag.start(), after.end() if after[1] else after.start()
            text = attempt[tag.end() : after.start()]
            steps.append(Step(tag[2], text, attempt[start:end], start, end))
    return steps


def differences(attempt, critique):
    """(ours, theirs): the steps of each, from the first that they do not share word for word."""
    ours, theirs = parse_steps(attempt), parse_steps(critique)
    while ours and theirs and ours[0].repeats(theirs[0]):
        del ours[0], theirs[0]
    return ours, theirs


def first_difference(attempt, critique):
    """The attempt's first step (or answer) that the critique does not repeat, or None."""
    return next(iter(differences(attempt, critique)[0]), None)


def correction(attempt, critique):
    """The verdict on the first difference: "Step 2 is wrong. Correct: <step_2>...</step_2>"."""
    ours, theirs = differences(attempt, critique)
    right = f"Correct: {theirs[0].source}" if theirs else ""
    # a step that comes later in the critique is right: the critique inserts one before it
    if ours and ours[0].text.split() not in [step.text.split() for step in theirs]:
        return f"{ours[0].title} is wrong. {right}"
    return right or "Every step is correct."


def align(walk, attempt):
    """A critique's steps as text, with the attempt's white space inside tags and between steps."""
    steps = parse_steps(attempt)
    gaps = [gap[0] for step in steps if (gap := GAP.match(attempt, step.end))] or ["\n"]
    steps = steps or parse_steps("<answer></answer>")  # no white space inside
    aligned = ""
    for n, step in enumerate(walk):
        ours = steps[min(n, len(steps) - 1)]
        inside = ours.text.replace(ours.text.strip(), step.text.strip(), 1)
        changed = f"<{step.name}>{inside}</{step.name}>"
        aligned += ours.source if step.repeats(ours) else changed  # repeated: every character
        aligned += gaps[min(n, len(gaps) - 1)]
    return aligned.rstrip()


# ================================================================================ answers
# An answer is a value with a label: "x=5", "She pays $5", "5\pi square cm", "5 apples in total".
# The value has a digit or a command. It has a space only in 1 1/2.
VALUE = r"(?:-?[0-9]+ (?=[0-9]+/))?(?=[^ ]*[0-9\\])[^ ]+"
VARIABLE = r"[A-Za-z]?(?:\([a-z0-9, ]+\))?(?:=|\\in\b)"  # x=, f(x)=, (x,y)=, x\in
# The word after the value has three letters or is one of these: "3 x" and "3 xy" are values.
UNIT = r"(?:[ckm]?[mgl]|[hs]|hr|ft|in|lbs?|oz|[ap]m|of|is|[a-z.]{3,})(?:/[a-z]+)?(?:\^[23])?"
# Number words, parts, multiples, negation and comparison change the number and are no label.
CHANGES = r"hundred|thousand|[a-z]*illion|dozen|pair|hal[fv]|quarter|two\b|three|four|fi[fv]|six"
CHANGES += r"|seven|eigh|nin[et]|tens\b|tenth|twe|thir[dt]|twice|doubl|tripl|times\b|squared|cubed"
CHANGES += r"|root|factorial|minus|plus|negative|not\b|[a-z]+n't|never|or\b|than\b|below|repeat"
LABELLED = rf"(?!.*(?<![\\a-z])(?:{CHANGES}))({VARIABLE}|(?:[A-Za-z'.]+ )*[a-z'.]{{2,}}[ =])?"
LABELLED += rf"({VALUE})( {UNIT}(?: [A-Za-z'./]+)*)?"
# Sign, whole part of a mixed number, number (3/4; 1,234.50; 12, .5 or 3e5), power.
NUMBER = r"\+?(-?)(?:([0-9]+) (?=[0-9]+/))?([0-9]+/[1-9][0-9]*(?!\^)|[0-9]{1,3}(?:,[0-9]{3})+"
NUMBER += r"(?:\.[0-9]+)?|(?:[0-9]*\.)?[0-9]+(?:e-?[0-9]{1,2})?)(?:\^([0-9]{1,2}))?"
SIGNS = r"−- –- ⁄/ ≤\le ≥\ge ×\times ±\pm π\pi ∞\infty ∪\cup ∈\in √\sqrt %percent €euro ¢cent"
SIGNS = {ord(pair[0]): f" {pair[1:]} " for pair in SIGNS.split()}
# Rules for one spelling, in this order: pattern → replacement. ␣ is a space; without → it deletes.
RULES = r"""
<= → \\le␣
>= → \\ge␣
[⁰¹²³⁴-⁹]+ → ^{\g<0>}
(?=[¼-¾⅐-⅞])|(?<=[0-9])(?=(?:[ckm][mgl]|ft|[ap]m|lbs?|mph)\b) → ␣
,\\!|(?:\{,\}|\\,|[^\S␣-~])(?=[0-9]{3}) → ,
(?<![\\a-z])(pi|sqrt|log|ln|exp|(?:arc)?(?:sin|cos|tan))\b → \\\1
\\(?:text|math|mbox)[a-z]*\s*\{([^{}]*)\} → ␣\1
\\!|\\(?=[{}])|\\(?:left|right|displaystyle)\b|(?<=\\[gln]e)q\b|(?<=\\)[dtc](?=frac)
(?<!\\)\$+([^$]*[^$\\])\$+ → ␣\1␣
(-?)\\?\$␣?(-?[0-9]+(?:[,.][0-9]+)*)? → \1\2␣dollar␣
°|\^\s*\{?\\circ\}? → ␣degree␣
([\^_])(?:\{(-?[0-9]+|[A-Za-z])\}|([0-9]+|[A-Za-z])) → \1\2\3␣
(?:(?<!\\)\\[,;:␣()\[\]]|~|\s)+ → ␣
^(.*?)\\boxed\{(.*)\}␣?$ → \1␣\2
␣?([^\w\s,.])(?:␣(?![A-Za-z]{2}))? → \1
^[␣*:#=`]+|[␣*.,;:`]+$|(?i:^(?:the␣)?(?:final␣|correct␣)?(?:answer|option|choice)(?:␣is)?[␣*:]*)
^\(?([^(),]+)\)$ → \1
\(([A-Za-z␣]{3,})\) → ␣\1
(?<=[0-9])\\(?:times|cdot)␣?10\^(-?[0-9]{1,2})\b → e\1
\\sqrt␣?(?:\((\w+)\)|([0-9]+|[a-z])) → \\sqrt{\1\2}
(\\frac(?:\{[^{}]*\})?)␣?(\w) → \1{\2}
([0-9])\\frac\{([0-9]+)\}\{([0-9]+)\} → \1␣\2/\3
\\frac\{((?:[^{}]|\{[^{}]*\})*)\}\{((?:[^{}]|\{[^{}]*\})*)\} → (\1)/(\2)
(?<![\w)}\]^/])\((-?[\w.^\\{}]+(?:\([^()]*\))?)\)/ → \1/
/\(([0-9.]+|[A-Za-z]|\\sqrt\{\w+\})\)(?![\w(^]) → /\1
"""
RULES = [row.partition(" → ") for row in RULES.strip().replace("␣", " ").splitlines()]


def last_answer(completion):
    """The text of the last closed <answer>, or an empty string."""
    return next((s.text for s in reversed(parse_steps(completion)) if s.name == "answer"), "")


@lru_cache
def read_answer(text):
    r"""(value, label): a number's Fraction, or an expression as written, and the words around it.

    1/2, \frac12, $\boxed{\dfrac{1}{2}}$ and "The answer is 0.50." have the same value.
    """
    if len(text) > 1000:  # too long; Python refuses numbers over 4,300 digits
        return text, ""
    for _ in range(2):  # for \boxed{\boxed{3}}
        text = text.translate(SIGNS)
        for pattern, _, replacement in RULES:
            text = re.sub(pattern, replacement, text)
        text = unicodedata.normalize("NFKC", text)  # full-width digits, ½
    text = re.sub(r"(?<!\\)\b[A-Za-z]{2,}", lambda word: word[0].lower(), text)  # X is not x
    parts = re.fullmatch(LABELLED, text) or re.fullmatch(rf"({VARIABLE})?(.*)()", text)
    before, value, after = parts.groups("")
    label = re.sub(r"=|(?<=[hx])es\b|\Bs\b", "", before + after).strip()  # no plurals
    number = re.fullmatch(NUMBER, value)
    if not number:
        return re.sub(r"(?<![0-9]) | (?![0-9])", "", value), label
    minus, whole, digits, power = number.groups("")
    size = int(whole or 0) + Fraction(digits.replace(",", "")) ** int(power or 1)
    return -size if minus else size, label


def is_correct(completion, answer):
    """The reward in training and the grade in evaluation. One of the answers may lack the label."""
    answers = read_answer(last_answer(completion)), read_answer(answer)
    (value, label), (wanted, longer) = sorted(answers, key=lambda pair: len(pair[1]))
    if not label and longer == "percent" and isinstance(wanted, Fraction):
        return value == wanted / 100 or value == wanted > 1  # 60% is 60 or 0.6; 0.6% is not 0.6
    short = len(label) == 2 and re.fullmatch(rf"{label[0]}[a-z]*{label[1]}[a-z]*", longer)  # kg
    return value == wanted != "" and (label in ("", longer) or bool(short))


# ================================================================================ critics
def cache_file(kind, identity):
    """Path of a cached result. The identity lists all inputs of the result."""
    key = hashlib.sha256(repr(identity).encode()).hexdigest()
    return Path(f"runs/.cache/{kind}-{key[:32]}.json")


@dataclass(frozen=True)
class Critique:
    text: str | None  # the corrected attempt; None if the critic failed
    failure: str = ""  # why it failed
    reply: str = ""  # what a failed critic wrote
    aligned: float = 0.0  # share of the attempt's steps repeated before one is changed; right: 1
    step_changed: bool = False  # it changes or adds a step; a bad critic changes the answer only
    dropped: float = 0.0  # share of the reply, without thinking, that is not in the text


def parse_critique(reply, rollout):
    """The last walk in a critic's reply, aligned, if it has steps and the right answer."""
    reply, walk = reply or "", {}
    for step in parse_steps(reply):
        while step.name in walk:  # the critic quoted the attempt, or began anew
            walk.popitem()
        walk[step.name] = step
    if "answer" not in list(walk)[1:]:
        return Critique(None, "no steps or no answer" if reply else "the rule returned None", reply)
    if not is_correct(reply, rollout.problem.answer):
        return Critique(None, "wrong answer", reply)
    text = align(walk.values(), rollout.text)
    steps = len(parse_steps(rollout.text))
    ours, theirs = differences(rollout.text, text)
    return Critique(
        text,
        aligned=(steps - len(ours)) / max(1, steps),  # 0 if the attempt has no steps
        step_changed=bool(theirs) and theirs[0].name != "answer",
        dropped=max(0, 1 - len(text) / len(SPOKEN.match(reply)[1])),
    )


def rule_critic(path):
    """A .py critic: critique(problem, attempt) -> text or None; eval.py also uses judge."""
    try:
        critique = runpy.run_path(path)["critique"]
    except Exception as error:  # whatever the file raises, or KeyError
        raise UserError(f"cannot get critique(problem, attempt) from {path}: {error!r}") from None

    def ask(rollouts, messages):
        replies = [critique(rollout.problem, rollout.text) for rollout in rollouts]
        for reply in replies:
            if not isinstance(reply, str | None):
                raise UserError(f"{path}: critique() must return str or None, got {reply!r}")
        return [parse_critique(*pair) for pair in zip(replies, rollouts, strict=True)]

    return ask


def request(client, url, cfg, message):
    """(text, failure) of the server's chat completion; no reply is a text None."""
    body = {"model": cfg.critic_model, "max_tokens": cfg.critic_max_tokens, "temperature": 0}
    body["messages"] = [{"role": "user", "content": message}]
    key = {"Authorization": f"Bearer {os.environ.get('CRITIC_API_KEY', 'none')}"}
    for pause in (1, 2, 4, 8, 16, 32, 0):  # seconds before the next try
        reply = ""
        try:
            response = client.post(f"{url}/chat/completions", json=body, headers=key)
            reply = f"HTTP {response.status_code}: {response.text}"  # servers word it in many ways
            choice = response.json()["choices"][0]
            text, reason = choice["message"].get("content") or "", choice["finish_reason"]
            if not isinstance(text, str):  # a list of parts, in which thinking has no text
                text = "".join(part.get("text", "") for part in text)
            return text, "" if reason in ("stop", "eos") else f"finish_reason {reason}"
        except Exception as error:  # transport and format errors of several libraries
            reply = reply or repr(error)
        if "temperature" in body and re.search("temperature|nsupported.*max_tokens", reply):
            body["max_completion_tokens"] = body.pop("max_tokens")  # for hosted reasoning models
            del body["temperature"]
        elif re.match("ReadTimeout|HTTP (?!408|429|5)", reply):  # another try would not help
            break
        else:
            if pause == 4:
                tqdm.write(f"{url} does not answer, trying again: {reply[:100]!r}")
            time.sleep(pause)
    hint = "set CRITIC_API_KEY: " if re.match("HTTP 40[13]", reply) else ""
    return None, f"{hint}{url}/chat/completions: {' '.join(reply.split())[:300]}"


def server_critic(cfg):
    """The critic on an OpenAI-compatible server."""
    url = cfg.critic.rstrip("/")
    if not cfg.critic_model:
        raise UserError(f"set --critic-model; the names: curl {url}/models")
    # The hub's client is an httpx.Client. A new one follows no redirects and sends no hub token.
    client = type(get_session())(timeout=(10, 600, 600, None))  # connect, read, write, queue: s

    def complete(messages):
        with ThreadPool(cfg.critic_batch) as pool:  # of daemon threads: Ctrl-C does not wait
            yield from pool.imap(lambda message: request(client, url, cfg, message), messages)

    return cached(complete, [url, cfg.critic_model, cfg.critic_max_tokens])


def cached(complete, identity):
    """A critic from complete(messages), which yields (text, failure); no reply is a text None."""

    def ask(rollouts, messages):
        files = {message: cache_file("critic", [identity, message]) for message in messages}
        new = [message for message in files if not files[message].exists()]
        replies, failures, lost = complete(new), {}, 0
        for message in tqdm(new, "critic", leave=False, disable=None):
            text, failure = next(replies)
            lost += text is None
            if text and not failure:
                with atomic_write(files[message]) as file:
                    file.write(text.encode("utf-8", "replace"))
            else:
                failures[message] = Critique(None, failure or "empty reply", text or "")
        if 0 < lost == len(files):
            raise UserError(failure)
        return [
            failures.get(m) or parse_critique(files[m].read_text("utf-8"), r)
            for r, m in zip(rollouts, messages, strict=True)
        ]

    return ask
