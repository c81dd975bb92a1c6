"""Who answers when asked for a critique. Knows nothing of training.

A critic reads a problem, a solver's step-tagged attempt and the ground truth, and writes a
*corrected walk through that very attempt*: right steps word for word, the first wrong step
rewritten, then on from the corrected value. The paper (Kara & Ersoy, arXiv 2606.11173) asks its
critic to be such a faithful scribe in four cases:

    A  all steps right                 reproduce the attempt
    B  right answer, a step missing    insert the step
    C  unfinished                      finish it
    D  a wrong step                    reproduce up to it, rewrite it, carry on

There are three, and each answers the same call, `ask(problems, attempts, prompts) -> [Critique]`, one for
each attempt. A failure is a value, `Critique(None, failure="why")`, and never text that reaches a prompt.

    scribe         a rule for the embedded task, last-digit arithmetic: redoes the arithmetic, needs no prompt
    local_critic   a frozen Hugging Face chat model
    http_critic    any OpenAI-compatible server
"""

import hashlib, http.client, json, os, re, time, urllib.error, urllib.request  # noqa: E401
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, zip_longest
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from tqdm import tqdm


class Stop(Exception):
    """Ends the program with one clear line and exit status 2."""


# ------------------------------------------------------------------------ step-tagged text
# Tags are found in one pass and paired by hand. A pattern such as `<step_(\d+)>(.*?)</step_\1>`
# takes quadratic time on an attempt that opens ten thousand tags and closes none.
TAG = re.compile(r"<(/?)(step_[0-9]{1,4}|answer)>")


@dataclass(frozen=True)
class Step:
    name: str  # "step_1", "step_2", … or "answer"
    text: str  # what stands between the tags
    start: int  # the span of characters in the attempt, tags included: attempt[start:end]
    end: int


def parse_steps(attempt: str) -> list[Step]:
    """The closed steps of an attempt and its answer, in the order they stand there.

    An opening tag counts if the next tag closes it; anything else is passed over. Never raises.
    """
    steps, opening = [], None
    for tag in TAG.finditer(attempt):
        closes, name = tag.groups()
        if closes and opening and opening[2] == name:
            steps.append(Step(name, attempt[opening.end() : tag.start()], opening.start(), tag.end()))
        opening = None if closes else tag
    return steps


def first_difference(attempt: str, critique: str) -> Step | None:
    """The attempt's first step (or answer) that the critique does not have, word for word, in the same place."""
    for ours, theirs in zip_longest(parse_steps(attempt), parse_steps(critique)):
        if ours is None or theirs is None or (ours.name, ours.text.split()) != (theirs.name, theirs.text.split()):
            return ours  # None if the attempt ends before the critique does
    return None


def join_steps(steps: list[str], answer) -> str:
    """Tags the steps 1, 2, 3, … and adds the answer."""
    tagged = [f"<step_{n}>{text}</step_{n}>" for n, text in enumerate(steps, 1)]
    return "".join(tagged) + f"<answer>{answer}</answer>"


# ------------------------------------------------------------------------ answers, by value
PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"  # 12  1,234  0.5  .5
LATEX_FRACTION = re.compile(rf"\\[dtc]?frac\s*(?:{{\s*(-?(?:{PLAIN}))\s*}}|([0-9]))\s*(?:{{\s*({PLAIN})\s*}}|([0-9]))")
NUMBER = re.compile(rf"([+-]?)\s*(?:([0-9]+)\s+)?({PLAIN})\s*(?:/\s*({PLAIN}))?\s*(%?)")
# What may stand around a number: a currency, words and units, "x =", degrees.
AROUND = re.compile(r"[$€£*]|\b[^\W\d_]{2,}(?:\^\{?[23]\}?)?[:.]?(?=\s|$)|^.*=|\^\{?\\circ\}?|°")


def number(text: str) -> Fraction | None:
    """The value of 12, -0.5, 1,234, 1/2, 1 1/2 (mixed), \\frac12 or 50%; None of anything else."""
    text = LATEX_FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text).strip()
    match = NUMBER.fullmatch(text)
    if not match or (match[2] and not match[4]):  # "1 2" is no number, "1 1/2" is one
        return None
    over, under = (Fraction(part.replace(",", "").rstrip(".")) for part in (match[3], match[4] or "1"))
    if not under:
        return None
    value = (int(match[2] or 0) + over / under) * (-1 if match[1] == "-" else 1)
    return value / 100 if match[5] else value


def canonical(answer: str) -> str:
    """One text for all spellings of an answer: of a number its value, as a fraction; else the text without dressing.

    1/2, 0.5, \\frac12, $\\boxed{\\dfrac{1}{2}}$, 50\\% and "The answer is 0.50." agree. Sets, pairs and
    expressions are compared as written, but for white space.
    """
    if len(answer) > 1000:
        return "".join(answer.split())
    text = answer
    if (start := answer.rfind("\\boxed{")) >= 0:  # what it holds, up to the brace that closes it
        text = answer[start + len("\\boxed") :]
        depths = accumulate((c == "{") - (c == "}") for c in text)
        text = text[1 : next((n for n, depth in enumerate(depths) if depth == 0), len(text))]
    text = re.sub(r"\\(?:text|mathrm|mathbf|mbox)\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\left|\\right|\\[!,;: ()\[\]]|~", lambda m: "" if m[0] == "\\," else " ", text)
    for spelling, plain in ("{,}", ","), ("\\%", "%"), ("\\$", "$"), ("\N{MINUS SIGN}", "-"):
        text = text.replace(spelling, plain)
    text = text.lstrip(" \t\n:$*").rstrip(" \t\n.,;:$*")
    value = number(text)
    value = number(AROUND.sub("", text).lstrip(" :").rstrip(" .,;:")) if value is None else value
    if value is not None:
        return str(value)
    text = re.sub(r"(?i)^.*\banswer(?: is)?:?\s", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text).replace("$", "")
    return " ".join(re.sub(r"\s*([^\w\s])\s*", r"\1", text).split()).casefold()


def extract_answer(completion: str) -> str | None:
    """What stands in the last closed <answer>, in its canonical spelling, or None."""
    answers = [step.text for step in parse_steps(completion) if step.name == "answer"]
    return canonical(answers[-1]) if answers else None


def is_correct(completion: str, answer: str) -> bool:
    """The reward in training and the grade in evaluation: one and the same. Compares values, not spellings."""
    return extract_answer(completion) == canonical(answer)


def keeps_format(completion: str) -> bool:
    """Does it have the steps 1, 2, 3, … and then an answer, each in tags of its own?"""
    names = [step.name for step in parse_steps(completion)]
    return len(names) > 1 and names == [f"step_{n}" for n in range(1, len(names))] + ["answer"]


def no_walk(critique: str, answer: str) -> str:
    """Why a text is not usable as a corrected walk, or "" if it is."""
    names = [step.name for step in parse_steps(critique)]
    if not any(name.startswith("step") for name in names):
        return "no steps"
    if "answer" not in names:
        return "no answer"
    return "" if is_correct(critique, answer) else "wrong answer"


# ------------------------------------------------------------------------ last-digit arithmetic
# `3*7+8*4+6*6`, every result kept modulo 10. There are two ways to work, equally right:
#   own        3*7=1  8*4=2  6*6=6  1+2=3  3+6=9     all products from the left, then the sums
#   reference  ×66→6  ×84→2  ⊕62→8  ×37→1  ⊕81→9     from the right, each sum as soon as it can be; operator first
OWN, REFERENCE = "*+=", "×⊕→"  # a way, and its symbols: times, plus, equals
CALCULATION = re.compile(r"[0-9][*+][0-9]=[0-9]|[×⊕][0-9][0-9]→[0-9]")
PROBLEM = re.compile(r"[0-9]\*[0-9](\+[0-9]\*[0-9])*")


def times(a: int, b: int) -> int:
    return a * b % 10


def carry_on(products, values, ways, product=times, slip=None):
    """Works a problem out from any point on. Returns (the remaining steps' texts, the answer).

    products: the factors (a, b) of the products still to take, in the problem's order.
    values: the results still to be added up.
    ways: OWN or REFERENCE for each remaining step; beyond the last, as the last.
    product: what a times b is; pretraining passes a made-up table.
    slip: (n, value) writes that value into the n-th step from here, and carries on from it.
    """
    products, values, steps = list(products), list(values), []
    while products or len(values) > 1:
        way = ways[min(len(steps), len(ways) - 1)]
        multiply, add, equals = way
        if len(values) > 1 and (way == REFERENCE or not products):
            symbol, (a, b), values = add, values[:2], values[2:]
            result = (a + b) % 10
        else:
            symbol, (a, b) = multiply, products.pop(0 if way == OWN else -1)
            result = product(a, b)
        if slip and slip[0] == len(steps):
            result = slip[1]
        steps.append((f"{a}{symbol}{b}" if way == OWN else f"{symbol}{a}{b}") + f"{equals}{result}")
        values = [result] + values if symbol == add else values + [result]
    return steps, values[0]


def read_step(text: str) -> tuple[str, int, int, int] | None:
    """(symbol, a, b, result) of a step's text in either way, or None if it is no calculation."""
    if not CALCULATION.fullmatch(text):
        return None
    symbol, a, b = text[:3] if text[0] in REFERENCE else (text[1], text[0], text[2])
    return symbol, int(a), int(b), int(text[4])


def factors(problem: str) -> list[tuple[int, int]]:
    """`3*7+8*4` as [(3, 7), (8, 4)]. Raises ValueError if the text is no such problem."""
    if not PROBLEM.fullmatch(problem):
        raise ValueError(f"not a problem of the embedded task: {problem[:60]!r}")
    return [(int(term[0]), int(term[2])) for term in problem.split("+")]


def judge(attempt: str) -> list[bool]:
    """For each step and answer that `parse_steps` finds: is it right in itself?

    A step is, when its own arithmetic holds, even if it starts from an earlier wrong value; an
    answer, when it repeats the value of the step before.
    """
    verdicts, previous = [], None
    for step in parse_steps(attempt):
        calculation = read_step(step.text)
        if step.name == "answer":
            verdicts.append(step.text.strip() == previous)
        else:
            verdicts.append(_holds(calculation))
            previous = step.text[4] if calculation else None
    return verdicts


def _holds(calculation) -> bool:
    if calculation is None:
        return False
    symbol, a, b, result = calculation
    return result == (times(a, b) if symbol in "*×" else (a + b) % 10)


def corrected_walk(problem: str, attempt: str) -> str:
    """What the faithful scribe writes (see the four cases above).

    Copies steps while each takes a product or a sum that is still open, and takes it right; then
    carries on from there, each step in the way that the attempt has at the same place. An attempt
    that cannot be read gets a fresh solution in the solver's own way.
    """
    products, values, copied = factors(problem), [], []
    texts = [step.text for step in parse_steps(attempt)]
    for text in texts:
        calculation = read_step(text)
        if not _holds(calculation):
            break
        symbol, a, b, result = calculation
        if symbol in "*×" and (a, b) in products:
            products.remove((a, b))
            values.append(result)
        elif symbol in "+⊕" and _takes(values, a, b):
            values.insert(0, result)
        else:
            break
        copied.append(text)
    ways = [REFERENCE if text[0] in REFERENCE else OWN for text in texts if read_step(text)] or [OWN]
    rest, answer = carry_on(products, values, ways[len(copied) :] or ways[-1:])  # beyond its end: as its last step
    return join_steps(copied + rest, answer)


def _takes(values: list[int], a: int, b: int) -> bool:
    """Takes a and b out of the values if both are there."""
    left = list(values)
    for value in (a, b):
        if value not in left:
            return False
        left.remove(value)
    values[:] = left
    return True


# ------------------------------------------------------------------------ critics
@dataclass(frozen=True)
class Critique:
    text: str | None  # the corrected walk, or None: the critic failed
    failure: str = ""  # why it failed, in a few words
    tokens: int = 0  # that the critic read and wrote; 0 if it is no model


def scribe(problems: list[str], attempts: list[str], prompts: list[str]) -> list[Critique]:
    """The rule-based critic of the embedded task."""
    critiques = []
    for problem, attempt in zip(problems, attempts, strict=True):
        try:
            critiques.append(Critique(corrected_walk(problem, attempt)))
        except ValueError as error:
            critiques.append(Critique(None, failure=str(error)))
    return critiques


def without_thinking(text: str) -> str:
    """What a model wrote after its thinking. Some templates open the thinking in the prompt: no tag opens it here."""
    text = text.encode("utf-8", "replace").decode()  # JSON may hold half a character, which breaks a tokenizer
    return text.rpartition("</think>")[2].strip()


def local_critic(model, tokenizer, max_tokens: int, batch_size: int):
    """answers(prompts) of a frozen chat model, greedy: yields (index, Critique), a batch at a time."""

    def answers(prompts):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        ids = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False) if chats else []
        limit = getattr(model.config, "max_position_embeddings", None) or float("inf")
        fits = [n for n, prompt in enumerate(ids) if len(prompt) + max_tokens <= limit]
        for n in set(range(len(ids))).difference(fits):
            yield n, Critique(None, "the prompt does not fit the critic")
        ends, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
        for start in range(0, len(fits), batch_size):
            batch = fits[start : start + batch_size]
            width = max(len(ids[n]) for n in batch)
            padded = torch.tensor([[pad] * (width - len(ids[n])) + ids[n] for n in batch], device=model.device)
            mask = torch.tensor([[0] * (width - len(ids[n])) + [1] * len(ids[n]) for n in batch], device=model.device)
            with torch.no_grad():
                output = model.generate(padded, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
            for n, row in zip(batch, output[:, width:].tolist()):
                end = next((t for t, token in enumerate(row) if token in ends), None)
                tokens = len(ids[n]) + (len(row) if end is None else end + 1)
                if end is None:
                    yield n, Critique(None, f"cut off after {max_tokens} tokens", tokens)
                else:
                    text = tokenizer.decode(row[:end], skip_special_tokens=True)
                    yield n, Critique(without_thinking(text), "", tokens)

    return answers


PAUSES = (1, 2, 4, 8, 16)  # seconds before each new try
LARGEST = 2**24  # bytes of a server's answer


def http_critic(url: str, model: str, max_tokens: int, at_once: int, timeout: float):
    """answers(prompts) of an OpenAI-compatible server at url, greedy: yields (index, Critique) as they come.

    The key, if one is needed, is read from the environment, CRITIC_API_KEY. Raises Stop if the server refuses it.
    """
    key = os.environ.get("CRITIC_API_KEY", "")

    def post(prompt: str) -> dict:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
        body |= {"temperature": 0, "max_tokens": max_tokens}
        request = urllib.request.Request(url.rstrip("/") + "/chat/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        deadline, answer = time.monotonic() + timeout, b""
        with urllib.request.urlopen(request, timeout=timeout) as response:
            while part := response.read1(2**16):
                answer += part
                if len(answer) > LARGEST:
                    raise ValueError("more than 16 MiB")
                if time.monotonic() > deadline:
                    raise TimeoutError("it does not come to an end")
            if response.length:  # bytes that were announced and did not come
                raise http.client.IncompleteRead(answer)
        return json.loads(answer)

    def one(numbered) -> tuple[int, Critique]:
        n, prompt = numbered
        for pause in (*PAUSES, None):
            try:
                answer = post(prompt)
                choice, usage = answer["choices"][0], answer.get("usage") or {}
                cut_off = choice.get("finish_reason") == "length"
                tokens = int(usage.get("total_tokens") or max_tokens * cut_off)
                if cut_off:
                    return n, Critique(None, f"cut off after {max_tokens} tokens", tokens)
                return n, Critique(without_thinking(choice["message"]["content"]), "", tokens)
            except urllib.error.HTTPError as error:
                failure = f"HTTP {error.code}"
                if error.code in (401, 403):
                    raise Stop(f"the critic at {url} refuses the key ({failure}): set CRITIC_API_KEY") from None
                if error.code not in (408, 429) and error.code < 500:
                    break
            except (OSError, http.client.HTTPException) as error:  # no connection, cut short, timed out
                failure = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                failure = "its answer is no chat completion"
                break
            if pause:
                time.sleep(pause)
        return n, Critique(None, failure)

    def answers(prompts):
        with ThreadPool(at_once) as pool:  # left early, it waits for nobody: its threads are daemons
            yield from pool.imap_unordered(one, enumerate(prompts))

    return answers


def remembering(answers, name: str, file: Path):
    """ask(problems, attempts, prompts) over `answers`: what a critic has answered once is read from the file.

    Raises Stop if no prompt of a call gets an answer at all: the critic is not there.
    """
    known = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                known[row["prompt"]] = Critique(row["text"], "", row["tokens"])
            except (ValueError, LookupError, TypeError):
                continue  # empty, or cut short when its writer was killed

    def ask(problems, attempts, prompts):
        keys = [hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest() for prompt in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts) if key not in known}
        failed, names = {}, list(new)
        bar = tqdm(total=len(new), desc="critic", leave=False, disable=not new)
        for n, critique in answers(list(new.values())):
            bar.update()
            if critique.text is None:
                failed[names[n]] = critique
                continue
            known[names[n]] = critique
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8") as log:
                row = {"prompt": names[n], "text": critique.text, "tokens": critique.tokens}
                log.write(f"\n{json.dumps(row)}\n")  # a line of its own, also behind one that was cut short
        bar.close()
        critiques = [known.get(key) or failed[key] for key in keys]
        if critiques and not any(c.text or c.tokens for c in critiques):
            raise Stop(f"the critic {name} answered none of {len(prompts)} prompts: {critiques[0].failure}")
        return critiques

    return ask
