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
from itertools import zip_longest
from multiprocessing.pool import ThreadPool
from pathlib import Path

from huggingface_hub import InferenceClient, get_session
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
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


# ================================================================================ problems
@dataclass(frozen=True)
class Problem:
    problem: str
    solution: str  # the reference solution
    answer: str


def read_problems(path):
    """The problems of a JSONL file, one object a line. Raises UserError with file and line."""
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file")
    problems = []
    lines = Path(path).read_text("utf-8-sig", errors="surrogateescape").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = Problem(row["problem"], row["solution"], row["answer"])
            if not all(text.strip() for text in vars(problem).values()):
                raise ValueError("an empty string")
            "".join(vars(problem).values()).encode()  # a lone surrogate would break a tokenizer
        except Exception as error:  # json raises many types
            wanted = "expected the strings problem, solution and answer"
            raise UserError(f"{path}, line {number}: {wanted}; got {error!r}") from None
        problems.append(problem)
    return problems


def load_problems(path):
    """[train, validation, test] problems of a folder, or of one JSONL file that is split."""
    if Path(path).is_dir():
        sets = [read_problems(Path(path) / f"{name}.jsonl") for name in ("train", "val", "test")]
    else:
        problems = read_problems(path)
        random.Random(0).shuffle(problems)
        test = min(len(problems) // 5, 100)
        val = test + min(len(problems) // 10, 50)
        sets = [problems[val:], problems[test:val], problems[:test]]
    if not all(sets):
        raise UserError(f"{path}: too few problems for train, val and test; a single file needs 10")
    text, count = Counter(p.problem for problems in sets for p in problems).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: duplicate problem, {count} times: {text[:60]!r}")
    return sets


# ================================================================================ step-tagged text
# Not one regex: `<step_(\d+)>(.*?)</step_\1>` takes quadratic time if no tag is ever closed.
TAG = r"<(/?)(step_[0-9]{1,4}|answer)>"


@dataclass
class Step:
    name: str  # "step_1", "step_2", … or "answer"
    text: str  # what stands between the tags
    start: int  # characters of the attempt, tags included: attempt[start:end]
    end: int

    @property
    def title(self):
        return self.name.replace("_", " ").capitalize()  # "Step 1"


def parse_steps(attempt):
    """The steps and answers in order. An opening tag counts if the next tag closes it."""
    steps, opening = [], None
    for tag in re.finditer(TAG, attempt):
        closes, name = tag.groups()
        if closes and opening and opening[2] == name:
            text = attempt[opening.end() : tag.start()]
            steps.append(Step(name, text, start=opening.start(), end=tag.end()))
        opening = None if closes else tag
    return steps


def first_difference(attempt, critique):
    """The attempt's first step (or answer) that the critique does not repeat at that position."""
    for ours, theirs in zip_longest(parse_steps(attempt), parse_steps(critique)):
        named_alike = ours and theirs and ours.name == theirs.name
        if not (named_alike and ours.text.split() == theirs.text.split()):
            return ours
    return None


def correction(attempt, critique):
    """The verdict on the attempt's first wrong step, with that step as the critique has it."""
    wrong = first_difference(attempt, critique)
    if wrong is None:
        return "Every step is correct." if parse_steps(attempt) else "There are no tagged steps."
    better = [critique[s.start : s.end] for s in parse_steps(critique) if s.name == wrong.name]
    return f"{wrong.title} is wrong. Correct: {''.join(better)}"


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
(?=[¼-¾⅐-⅞]) → ␣
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
(?<=[0-9])(?=(?:[ckm][mgl]|ft|[ap]m|lbs?|mph)\b) → ␣
(?<=[0-9])\\(?:times|cdot)␣?10\^(-?[0-9]{1,2})\b → e\1
\\sqrt␣?(?:\((\w+)\)|([0-9]+|[a-z])) → \\sqrt{\1\2}
(\\frac(?:\{[^{}]*\})?)␣?(\w) → \1{\2}
([0-9])\\frac\{([0-9]+)\}\{([0-9]+)\} → \1␣\2/\3
\\frac\{((?:[^{}]|\{[^{}]*\})*)\}\{((?:[^{}]|\{[^{}]*\})*)\} → (\1)/(\2)
(?<![\w)}\]^/])\((-?[\w.^\\{}]+(?:\([^()]*\))?)\)/ → \1/
/\(([0-9.]+|[A-Za-z]|\\sqrt\{\w+\})\)(?![\w(^]) → /\1
"""
RULES = [row.partition(" → ")[::2] for row in RULES.strip().replace("␣", " ").split("\n")]


def last_answer(completion):
    """The text of the last closed <answer>, or an empty string."""
    answers = [step.text for step in parse_steps(completion) if step.name == "answer"]
    return answers[-1] if answers else ""


@lru_cache
def read_answer(text):
    r"""(value, label): a number's Fraction, or an expression as written, and the words around it.

    1/2, \frac12, $\boxed{\dfrac{1}{2}}$ and "The answer is 0.50." have the same value.
    """
    if len(text) > 1000:  # too long; Python refuses numbers over 4,300 digits
        return text, ""
    for _ in range(2):  # for \boxed{\boxed{3}}
        text = text.translate(SIGNS)
        for pattern, replacement in RULES:
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


def same_answer(one, other):
    """Whether two results of read_answer agree. One side may lack the label."""
    (value, label), (wanted, longer) = sorted([one, other], key=lambda answer: len(answer[1]))
    if not label and longer == "percent" and isinstance(wanted, Fraction):
        return value == wanted / 100 or value == wanted > 1  # 60% is 60 or 0.6; 0.6% is not 0.6
    short = len(label) == 2 and re.fullmatch(rf"{label[0]}[a-z]*{label[1]}[a-z]*", longer)  # kg
    return value == wanted != "" and (label in ("", longer) or bool(short))


def is_correct(completion, answer):
    """The reward in training and the grade in evaluation."""
    return same_answer(read_answer(last_answer(completion)), read_answer(answer))


# ================================================================================ critics
def cache_file(kind, identity):
    """Path of a cached result. The identity lists all inputs of the result."""
    key = hashlib.sha256(repr(identity).encode()).hexdigest()
    return Path("runs/.cache") / f"{kind}-{key[:32]}.json"


@dataclass
class Critique:
    text: str | None  # the corrected text; None if the critic failed
    failure: str = ""  # why it failed


def parse_critique(text, answer):
    """The tagged part of what a critic wrote, if it has steps and the right answer."""
    text = (text or "").rpartition("</think>")[2]
    steps = parse_steps(text)
    if not any(step.name == "answer" for step in steps[1:]):
        return Critique(None, "no steps or no answer")
    if not is_correct(text, answer):
        return Critique(None, "wrong answer")
    return Critique(" ".join(text[step.start : step.end] for step in steps))


def rule_critic(path):
    """A .py critic: critique(problem, attempt) -> text or None; eval.py also uses judge."""
    critique = runpy.run_path(path).get("critique")
    if critique is None:
        raise UserError(f"{path} has no function critique(problem, attempt)")

    def ask(rollouts, messages):
        return [parse_critique(critique(r.problem, r.text), r.problem.answer) for r in rollouts]

    return ask


def server_critic(cfg):
    """The critic on an OpenAI-compatible server. Raises UserError if it refuses the key."""
    if not re.fullmatch(r"https?://([\w.-]+|\[[\w:]+\])(:[1-6]?[0-9]{1,4})?(/.*)?", cfg.critic):
        raise UserError(f"--critic {cfg.critic} is not a URL such as http://HOST:PORT/v1")
    # With no key the client would send the user's Hugging Face token to this server.
    key = os.environ.get("CRITIC_API_KEY", "none")
    client = InferenceClient(base_url=cfg.critic, api_key=key, timeout=600)  # seconds without data
    get_session().follow_redirects = False  # a redirect could take the prompts to another host
    options = {"model": cfg.critic_model, "max_tokens": cfg.critic_max_tokens, "temperature": 0}

    def ask_server(message):
        for pause in (1, 2, 4, 8, 16, None):  # seconds before the next try
            try:
                chat = client.chat_completion([{"role": "user", "content": message}], **options)
                choice = chat.choices[0]
                return choice.message.content, "cut off" if choice.finish_reason == "length" else ""
            except Exception as error:  # transport, protocol and format errors of several libraries
                response = getattr(error, "response", None)
                status = getattr(response, "status_code", 0)
                failure = f"HTTP {status}" if status else f"no usable answer: {error}"
                malformed = isinstance(error, (ValueError, LookupError, TypeError, AttributeError))
            if status in (401, 403):
                raise UserError(f"{cfg.critic} refuses the key ({failure}): set CRITIC_API_KEY")
            if malformed or pause is None or (400 <= status < 500 and status not in (408, 429)):
                return "", failure
            wanted = response.headers.get("Retry-After", "") if status else ""
            time.sleep(min(int(wanted), 60) if wanted.isdigit() else pause)

    def complete(messages):
        with ThreadPool(cfg.critic_batch) as pool:  # of daemon threads: Ctrl-C does not wait
            yield from pool.imap(ask_server, messages)

    return cached(complete, [cfg.critic, cfg.critic_model, cfg.critic_max_tokens])


def cached(complete, identity):
    """A critic from complete(messages), which yields (text, failure). Keeps texts in files."""

    def cache_path(message):
        return cache_file("critic", [identity, message])

    def ask(rollouts, messages):
        new = [message for message in dict.fromkeys(messages) if not cache_path(message).exists()]
        answers = tqdm(complete(new), "critic", len(new), leave=False, disable=not new)
        failures = {}
        for message, (text, failure) in zip(new, answers, strict=True):
            if failure or not text:
                failures[message] = Critique(None, failure or "empty reply")
                continue
            with atomic_write(cache_path(message)) as file:
                file.write(text.encode("utf-8", "replace"))
        if set(failures) == set(messages):
            raise UserError(f"every critique failed: {failures[messages[0]].failure}")
        return [
            failures.get(m) or parse_critique(cache_path(m).read_text("utf-8"), r.problem.answer)
            for r, m in zip(rollouts, messages, strict=True)
        ]

    return ask
