"""critic.py: problems, step-tagged text, answers by value, and the three critics."""

import json
import os
import random
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool
from unittest.mock import Mock

import pytest
import torch
from conftest import byte_tokenizer, flags, save_model

import critic
import sd
from critic import Critique, Problem, UserError

ATTEMPT = "<step_1>x</step_1> <answer>8</answer>"
ROLLOUT = sd.Rollout(Problem("p", "s", "9"), [], [], ATTEMPT, 0.0)
# Values, each with other spellings of it: "value | spelling | spelling ; value | spelling".
EQUAL = r"""
1/2 | 0.5 | .5 | 0.50 | 50% | 50\% | 50 % | \frac12 | \frac{1}{2} | \dfrac{1}{2} | \tfrac 1 2
1/2 | 2/4 ; 1/2 | $\frac{1}{2}$ | \(\frac{1}{2}\) | \boxed{\frac{1}{2}} | \boxed{0.5}.
1/2 | $\boxed{\dfrac{1}{2}}$
1/2 | \displaystyle\frac{1}{2} | ½ | 1/2 of the cake | \frac{1}{2} cup | $\frac{1}{2}$ cup
2.5 | 2½ | 2 1/2 hours ; 1.5 | 150% ; -1/2 | -\frac{1}{2} | \frac{-1}{2} | −0.5
3/2 | 1 1/2 | 1\frac{1}{2} | 1\frac12 ; -3/2 | -1 1/2 ; 1234 | 1,234 | 1{,}234 | 1\,234 | 1,\!234
1234567 | 1,234,567 ; 1234.5 | 1,234.50 | $1,234.5 ; 1000 | 10^3 ; 1024 | 2^{10}
300000 | 3 \times 10^5 | 3×10^{5} ; -5 | -$5 | $-5 | -\$5 | –5
12 | $12 | \$12 | $12$ | $12.00 | €12 | 12 dollars | 12¢ | (12) | #### 12 | １２ | **Answer:** 12
18 | $18 per day | She makes $18 every day. | USD 18 | $18/hour | 18 in total | 18 (apples)
16 | 16 years old | 16 cups of flour | 16 square cm | 16 miles/hour | The total is 16.
16 | Total = 16 ; 3 | +3 | 3. | 3.0 | 003 | The answer is 3. | the final answer is: 3 | x = 3 | x=3.
3 | \boxed{x = 3} ; 3 | 3 apples | **3** | \boxed{\boxed{3}} | = 3 | x=\boxed{3} | f(2) = 3
-3 | −3 | - 3 ; 0 | -0 | 0.0
5 | 5\text{ cm} | 5 \mathrm{cm}^2 | 5 cm^2 | 5\,cm | 5kg | 5 m | 5 months | 5 square feet
5 | 5 p.m. ; 5 eggs | 5 Eggs ; 20 | 20 km/h ; 60 | 60% ; 0.6 | 60%
90 | 90^\circ | 90^{\circ} | 90° ; x+1 | x + 1 ; 1 hour | 1 hours ; 5 kg | 5 kilograms | 5kg
60 percent | 60% ; $18 | 18 dollars | 18$ ; 5:30 | 5:30 PM ; x^2 | x^{2} | x² ; x^2y | x^{2}y
x \ge 3 | x \geq 3 | x≥3 | x >= 3 ; A | (A) | A) | Option A | \text{(A)}
(1,2) | ( 1, 2 ) | (1 , 2) | \left(1, 2\right) | The answer is (1, 2). | (x, y) = (1,2)
(1,2) | (1,2) only ; {1,2} | \{1,2\} | \boxed{\{1, 2\}} ; 69,84 | $69$,$84$ ; [0,7] | x \in [0, 7]
\pm3 | \pm 3 | ±3 ; 10-4n | 10-4 n ; \frac{1}{2n+2} | \frac{1}{2 n+2} | 1/(2n+2)
\cos(2x) | \cos (2 x) ; y=-3x+8 | y = - 3 x + 8 | -3x+8
5\pi | 5π | 5 pi | 5\pi cm^2 | 5\pi square units ; \sqrt{13} | √13 ; n(n+1)/2 | \frac{n(n+1)}{2}
(x+1)/2 | \frac{x+1}{2} ; \sqrt{2} | \sqrt2 | √2 | sqrt(2) ; no | No
\sqrt{3}/\sqrt{2} | \frac{\sqrt{3}}{\sqrt{2}} ; no solution | No solution. ; 1\\2 | 1 \\ 2
10:45 am | 10:45 AM ; (-\infty,3] \cup [5,\infty) | (−∞, 3] ∪ [5, ∞) ; x \in [0,7] | x ∈ [0, 7]
x \le 4 | x ≤ 4 | x <= 4 ; 6 box | 6 boxes ; 7\pi | 7\pi\%
"""
UNEQUAL = r"""
5 | 5 hundred | 5 thousand | 5 quarters | 5 over two | 5 over three | 5 fourths | 5 fifths
5 | 5 sixths | 5 sevenths | 5 eighths | 5 ninths | 5 tens | 5 tenths | 5 twelfths | 5 tripled
5 | 5 cubed | 5 minus | 5 factorial | plus 5 | never 5 | 5 apples or so | 5 below zero
0.3 | 0.3 repeating
1/2 | 1/3 ; 0.5 | 50 | 5 ; 1 | 1/0 | x+1 | 1 in 4 ; 12 | 12 - 5 | 1 2 ; 1234 | 12,34 | 1, 234
23 | 2*3
3 | -3 | 2x | ٣ | 0x3 | 1 2 | 3h | 3abc | 3 hours 20 minutes | 3 hours 32 minutes | negative 3
3 | 3 thirds ; 5 | \boxed{}5 | __import__('os') | 5 million | 5 Million | 5\,000
x + y = 10 | x - y = 10 | 10
5 | 5 times | 5 doubled | 5 pairs of socks | 5 negative | twice 5 | not 5 | isn't 5 | 5 or 6
5 | 5 and a half
5 | 5 xy | 5 x | 5 sin x | ln 5 | 5k | 5 dozen eggs | 5 squared | square root of 5 | more than 5
5 | 5 to 6 | 5² ; $5 | 5 cents | €5 ; 0.6 | 0.6% | 6% ; 60 | 0.6 | 60x ; 5 cm | 5 m | 5 cm^2
20 apples | 20 oranges ; 0 | 2x+1=0 ; 25 | x^2+y^2=25 ; x=7, y=2 | x=1, y=2 ; x <= 3 | x >= 3 | 3
-2 | x=3 or x=-2 ; X | x ; (1,2) | (2,1) ; x^2y | x^{2y} ; 5 kg | 5 m | 5 g ; 2 or 1/2 | 5/2
x = 5 | y = 5 ; x^20 | x^{2}0 | x2 ; 13/4 | 1(3)/4 ; 1/23 | \frac123 ; 1/2x | 1/(2x)
(x+1)/2 | x+1/2 ; 10 | 10^2 ; \rightarrow | arrow ; 1/3 | 0.333 ; 35 | 3\boxed{5} ; 9/16 | 3/4^2
1/4 | 45¼ ; \sqrt{2}+1 | √(2+1) | \sqrt{3} ; \pi | 3.14
"""


def pairs(table):
    rows = [row.split(" | ") for row in table.strip().replace("\n", " ; ").split(" ; ")]
    return [(value, other) for value, *others in rows for other in others]


def graded(given, answer):
    return critic.is_correct(f"<answer>{given}</answer>", answer)


@pytest.mark.parametrize("one, other", pairs(EQUAL))
def test_spellings_of_one_value_agree(one, other):
    assert graded(one, other) and graded(other, one) and graded(f" {other} \n", one)


@pytest.mark.parametrize("one, other", pairs(UNEQUAL))
def test_other_values_do_not_agree(one, other):
    assert not graded(one, other) and not graded(other, one) and graded(other, other)


def test_the_last_answer_in_tags_counts_by_its_value():
    assert critic.is_correct(r"<answer>4</answer><answer>$\frac12$</answer>", "0.5")
    assert graded("12\u202f345", "12345")  # a narrow space
    for text in "", "3", r"\boxed{3}", "<answer>3", "<step_1>3</step_1>", "<answer></answer>":
        assert not critic.is_correct(text, "3") and not critic.is_correct(text, "**")


# ------------------------------------------------------------------------ step-tagged text
def tagged(steps, answer="9"):
    """Each character a step."""
    text = " ".join(f"<step_{n}>{step}</step_{n}>" for n, step in enumerate(steps, 1))
    return f"{text} <answer>{answer}</answer>".strip()


WALK = tagged("ab")


PARSED = {  # text -> names and texts of its steps
    "<step_1>a</step_1> x <answer>b</answer>": "step_1 a answer b",
    "<step_1>a <step_2>b<answer>c</answer>": "step_1 a step_2 b answer c",  # forgotten
    "<step_3>a</step_4></step_3><step_99999>b</step_99999>": "step_3 a",  # miscounted
    "<answer>a</step_1> <step_1>b</answer> <step_2>c": "step_1 b",
    "<think></think><step_1>a</step_1> <step_2></think> </step_2> <step_3>b</step_3>": "step_3 b",
    "<answer>a</answer> <think>maybe <answer>b</answer>? No, wait": "answer a",
}


@pytest.mark.parametrize("text", PARSED)
def test_steps_are_parsed_from_what_models_write(text):
    steps = critic.parse_steps(text)
    assert " ".join(f"{s.name} {s.text}" for s in steps).split() == PARSED[text].split()
    assert all(text[s.start : s.end].startswith(f"<{s.name}>{s.text}") for s in steps)


def test_the_first_difference_is_a_step_of_the_attempt():
    attempts = [tagged("abc"), "<step_1> a\n</step_1>", tagged("axx"), tagged("abcd")]
    wrong = [critic.first_difference(attempt, tagged("abc")) for attempt in attempts]
    assert wrong[:2] == [None, None] and [s.name for s in wrong[2:]] == ["step_2", "step_4"]


def parse(reply, attempt=""):
    return critic.parse_critique(reply, replace(ROLLOUT, text=attempt))


def test_a_critique_is_the_last_walk_to_the_right_answer():
    for reply in [
        WALK,
        f"Step 2 was wrong!\n{WALK} Well done.",  # comments never reach the teacher
        f"<think>hm</think>{tagged('xx')}</think>{WALK}",  # after the last </think>
        f"Student's attempt: {tagged('xxx', '8')} Corrected attempt: {WALK}",
        f"[THINK]{tagged('a', '9')}[/THINK]{WALK}",
        f"{tagged('ax', '8')} Wait, step 2 is wrong. {WALK[WALK.index('<step_2>') :]}",
        f"{WALK} <think> Or else {tagged('xx')}?",
    ]:
        assert parse(reply, WALK).text == WALK, reply
    assert parse(None) == Critique(None, "the rule returned None")
    for bad in f"{WALK}</think>", "<step_1>a</step_1>", "<answer>9</answer>", f"<think>{WALK}":
        assert parse(bad) == Critique(None, "no steps or no answer", bad)
    assert parse(tagged("ab", "8")) == Critique(None, "wrong answer", tagged("ab", "8"))
    assert parse(f"{'x' * 300}</think>{WALK}{'y' * len(WALK)}", WALK).dropped == 0.5


SPACED = "<step_1>a  b</step_2>\n<step_2>\n  {}\n</step_2>\n\n{}<answer>{}</answer>"
CHANGED = "<step_1>a b</step_1> <step_2>d</step_2> <step_3>e</step_3> <answer>9</answer>"
ALIGNED = [  # attempt, critic's reply, what the teacher sees
    (WALK.replace(" ", "\n"), WALK, WALK.replace(" ", "\n")),  # right: repeated, gaps included
    # verbatim up to the change, then the same white space, inside the tags too
    (SPACED.format("c", "", 8), CHANGED, SPACED.format("d", "<step_3>e</step_3>\n\n", 9)),
    ("<step_1>a</step_1>\n\n<step_2>b", WALK, WALK.replace(" ", "\n\n")),  # unfinished
    ("<step_1>a\n<step_2>b\n<answer>9</answer>", WALK, "<step_1>a\n<step_2>b\n<answer>9</answer>"),
    ("Sure! <step_1>a</step_1>\tSo <answer>8</answer>", WALK, WALK.replace(" ", "\t")),
    ("<step_1>x</step_1><answer>8</answer>", WALK, WALK.replace(" ", "")),
    ("It is 9", "<step_1>a\n<step_2> b<answer>9</answer>", WALK.replace(" ", "\n")),  # as in SOLVE
]


@pytest.mark.parametrize("attempt, reply, critique", ALIGNED)
def test_a_critique_has_the_attempts_white_space(attempt, reply, critique):
    assert parse(reply, attempt).text == critique


# ------------------------------------------------------------------------ what models may write
PIECES = [
    *("<step_1>", "</step_1>", "<step_2>", "<answer>", "</answer>", "<step_", "</", "<", ">"),
    *("</think>", "3*7=21", "9" * 50, "-", "1", ",", "234", ".", "/", "%", "$", "=", "x", " is "),
    *("\\frac", "\\boxed{", "\\text{", "{", "}", "(", "^", "٣", "½", "−", "\x00", "\x1b[31m"),
    *("\u202e", "\ud800", "{0}", "%s", "\n", "\t", " ", "🙂", "answer ", "halves ", "\\sqrt", "\\"),
]


def read(text):
    """Everything that reads what a model wrote."""
    rollout = replace(ROLLOUT, text=text, critique=WALK + text)
    critic.is_correct(text, "9")
    critic.is_correct("<answer>9</answer>", text)
    critic.parse_critique(text, replace(ROLLOUT, text=text))
    critic.parse_critique(WALK + text, rollout)
    sd.CONTEXTS["quote"](rollout)
    sd.CONTEXTS["omit"](rollout)
    assert sd.paint(text, -9.0).isprintable()


def test_hostile_text_is_read_without_an_error():
    rng = random.Random(0)
    for _ in range(3000):
        read("".join(rng.choices(PIECES, k=rng.randrange(20))))
    assert not graded("9" * 5000, "9") and graded("9" * 900, "9" * 900 + ".0")


@pytest.mark.parametrize("piece", [*PIECES, "<step_1></step_1>", "1 ", "a ", "\\frac{1}{", "1,"])
def test_long_text_takes_linear_time(piece):
    """A pattern with a back-reference took minutes where tags open and never close."""
    began, many = time.process_time(), piece * (100_000 // len(piece))
    read(many)
    for answer in many, *("5" + many[:980] + end for end in ("", "1", "x")):  # read up to 1000
        graded(answer, "9")
    assert time.process_time() - began < 2


# ------------------------------------------------------------------------ problems
GOOD = '{"problem": "p", "solution": "s", "answer": "1"}'
BAD_LINES = {  # a file's first lines -> what is said
    "[" * 100_000: "line 1: expected",
    GOOD + "\n\n[1]": "line 3: expected",
    GOOD.replace("p", "\\ud800", 2): "line 1: expected",
    GOOD.replace('"s"', '"\udcff"'): "line 1: expected",  # not UTF-8
    GOOD.replace('"s"', '" "'): "solution must be a string with text",
    GOOD.replace('"1"', "1"): "line 1: expected.*answer must be a string with text, got 1",
    GOOD + "\n" + GOOD: "duplicate problem, 2 times: 'p'",
}


@pytest.mark.parametrize("text", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_file_is_refused_with_file_and_line(text, tmp_path):
    more = "".join("\n" + GOOD.replace('"p"', f'"q{n}"') for n in range(10))
    path = tmp_path / "data.jsonl"
    path.write_bytes((text + more).encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=BAD_LINES[text]) as error:
        critic.load_problems(path)
    assert "data.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_file_is_split_into_disjoint_sets_always_the_same(tmp_path):
    path = tmp_path / "all.jsonl"
    for count, sizes in (40, [28, 4, 8]), (1000, [850, 50, 100]):
        names = [f'"p{n}"' for n in range(count)]
        lines = [GOOD.replace('"p"', name) for name in names]
        path.write_text("\n\n".join(lines) + "\n", "utf-8-sig")  # Windows editors add a BOM
        sets = critic.load_problems(path)
        texts = [f'"{p.statement}"' for problems in sets for p in problems]
        assert [len(problems) for problems in sets] == sizes and sets == critic.load_problems(path)
        assert sorted(texts) == sorted(names) and texts != names
    path.write_text(GOOD)
    with pytest.raises(UserError, match="too few"):
        critic.load_problems(path)


def test_a_folder_holds_its_own_split(tmp_path):
    for name in "train", "val", "test":
        (tmp_path / f"{name}.jsonl").write_text(GOOD.replace('"p"', f'"{name}"'))
    sets = critic.load_problems(tmp_path)
    assert [problem.statement for [problem] in sets] == ["train", "val", "test"]
    (tmp_path / "val.jsonl").write_text(GOOD.replace('"p"', '"test"'))
    with pytest.raises(UserError, match="duplicate problem, 2 times: 'test'"):
        critic.load_problems(tmp_path)
    (tmp_path / "val.jsonl").unlink()
    for missing in tmp_path, tmp_path / "all.jsonl":
        with pytest.raises(OSError, match=r"No such file.*\.jsonl'$"):
            critic.load_problems(missing)
    os.mkfifo(tmp_path / "val.jsonl")
    with pytest.raises(UserError, match="regular"), critic.atomic_write(tmp_path / "val.jsonl"):
        pass


# ------------------------------------------------------------------------ critics
def test_a_rule_from_a_file(tmp_path):
    rule = tmp_path / "rule.py"
    rule.write_text(f"def critique(problem, attempt):\n    return {WALK!r} if attempt else None\n")
    answers = critic.rule_critic(rule)([ROLLOUT, replace(ROLLOUT, text="")], ["", ""])
    assert [(a.text, a.failure) for a in answers] == [(WALK, ""), (None, "the rule returned None")]
    rule.write_text("def critique(problem, attempt): return [attempt]")
    with pytest.raises(UserError, match=r"rule.py: .* must return str or None, got \['"):
        critic.rule_critic(rule)([ROLLOUT], [""])
    for text, said in ("", "KeyError"), ("def critique(:", "SyntaxError.*rule.py', 1, "):
        rule.write_text(text)
        with pytest.raises(UserError, match=rf"\(problem, attempt\) from .*rule.py: {said}"):
            critic.rule_critic(rule)


def chat(text, reason="stop", **more):
    message = {"role": "assistant", "content": text} | more
    return 200, json.dumps({"choices": [{"message": message, "finish_reason": reason}]}).encode()


@contextmanager
def server(reply):
    """A server here; reply(message, number of the request, body) -> (status, content)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers, body))
            status, content = reply(body["messages"][0]["content"], len(requests), body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) + (status == 299)))
            self.send_header("Location", "/v1/chat/completions")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/v1", requests
        httpd.shutdown()


def ask_server(url, *messages, **more):
    settings = {"critic_model": "judge", "critic_max_tokens": 100, "critic_batch": 4}
    cfg = sd.parse_args(flags(settings | {"critic": url} | more))
    return critic.server_critic(cfg)([ROLLOUT] * len(messages), messages)


@pytest.fixture
def pauses(monkeypatch, tmp_path):
    """Records pauses instead of making them."""
    monkeypatch.chdir(tmp_path)
    made, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: made.append(s) if s >= 1 else sleep(s))
    return made


@pytest.mark.parametrize("key", ["secret", None])
def test_requests_are_parallel_and_greedy_and_carry_only_the_critics_key(key, pauses, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.delenv("CRITIC_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("CRITIC_API_KEY", key)
    together = threading.Barrier(4)

    def reply(message, n, body):
        together.wait(10)  # one after another, they would wait in vain
        return chat(tagged(message))

    with server(reply) as (url, requests):
        for base in url, url.replace("v1", "v1beta/openai/"):  # the path is taken as it is
            assert [c.text for c in ask_server(base, *"abcdefgh")] == list(map(tagged, "abcdefgh"))
    assert requests[7][0] == "/v1/chat/completions"
    assert requests[8][0] == "/v1beta/openai/chat/completions"
    for _, headers, body in requests:
        assert headers["Authorization"] == f"Bearer {key or 'none'}"
        assert "hf_mine" not in str(headers)
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("judge", 100, 0)
        [message] = body["messages"]
        assert message["role"] == "user" and message["content"] in "abcdefgh"


PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]
PARTS += [{"type": "text", "text": text} for text in (WALK[:9], WALK[9:])]
REPLIES = {  # what a server does -> its reply, what is said of it ("" if it is used), tries
    "vllm, thinking": (chat(WALK, reasoning_content="<answer>1</answer>", tool_calls=[]), "", 1),
    "parts": (chat(PARTS), "", 1),
    "together": (chat(WALK, "eos"), "", 1),
    "html": ((200, b"<html>\nWelcome</html>"), "<html> Welcome", 1),
    "content of another type": (chat({"text": WALK}), "content", 1),
    "lm studio, wrong path": ((200, b'{"error":"Unexpected endpoint"}'), "Unexpected endpoint", 1),
    "null content": (chat(None), "empty reply", 1),
    "cut off": (chat(WALK, "length"), "finish_reason length", 1),
    "sglang, aborted": (chat(WALK, "abort"), "finish_reason abort", 1),
    "ollama": ((404, b'{"error":"model not found, try pulling it first"}'), "pulling it first", 1),
    "vllm, wrong model": (
        (404, b'{"error":{"message":"No `judge`"}}'),
        "HTTP 404: .*No `judge`",
        1,
    ),
    "a limit": ((400, b"max_tokens is too large"), "too large", 1),
    "a long page": ((404, b"no page " * 999), "^.{300,350}$", 1),
    "moved": ((307, b""), "HTTP 307", 1),
    "a timeout of its own": ((408, b""), "HTTP 408", 7),
    "overloaded": ((429, b'{"error":{"message":"Rate limit"}}'), "HTTP 429: .*Rate limit", 7),
    "llama.cpp, loading": ((503, b'{"error":{"message":"Loading model"}}'), "Loading model", 7),
    "half a body": ((299, b'{"choices"'), "RemoteProtocolError", 7),
}


@pytest.mark.parametrize("behaviour", REPLIES)
def test_what_a_server_may_reply(behaviour, pauses, capsys):
    """A failure is one of that rollout alone and is said on one line."""
    reply, said, tries = REPLIES[behaviour]
    with server(lambda message, *_: chat(WALK) if message == "fine" else reply) as (url, requests):
        tested, fine = ask_server(url, "tested", "fine")
        assert fine.text == WALK and pauses == [1, 2, 4, 8, 16, 32][: tries - 1]
        assert len(requests) == tries + 1
        assert capsys.readouterr().out.count("trying again") == (tries > 2)
        assert re.search(f"{said or '^$'}", tested.failure) and "\n" not in tested.failure
        assert tested.text == (None if said else WALK)
        assert tested.reply == (WALK if "finish_reason" in said else "")
    with server(lambda message, n, body: chat(WALK) if n == 7 else reply) as (url, _):
        assert tries == 1 or ask_server(url, "tested")[0].text == WALK  # it recovered in time


def test_a_server_that_refuses_the_key_or_is_not_there_ends_the_program(pauses):
    for status in 401, 403:
        with server(lambda *_, status=status: (status, b"no \n entry")) as (url, _):
            said = f"^set CRITIC_API_KEY: {url}/chat/completions: HTTP {status}: no entry$"
            with pytest.raises(UserError, match=said):
                ask_server(url, "a")
            assert not pauses
    for bad in url, "http:///v1", "http://[::1/v1", "http://127.0.0.1:99999/v1":
        with pytest.raises(UserError, match="refused|protocol|Invalid|range") as error:
            ask_server(bad, *"ab")
        assert str(error.value).startswith(bad) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="^set --critic-model; .*: curl http://host/v1/models$"):
        ask_server("http://host/v1/", "a", critic_model="")


def test_a_slow_server_is_waited_for_once(pauses, monkeypatch):
    class Impatient(type(critic.get_session())):
        def __init__(self, timeout):
            assert timeout == (10, 600, 600, None)
            super().__init__(timeout=(9, 0.2, 9, 9))

    monkeypatch.setattr(critic, "get_session", lambda: Impatient((10, 600, 600, None)))
    with server(lambda message, *_: time.sleep(0.9) or chat(WALK)) as (url, requests):
        with pytest.raises(UserError, match="ReadTimeout"):
            ask_server(url, "a")
        assert len(requests) == 1 and not pauses


@pytest.mark.parametrize(
    "option, said",
    [
        ("max_tokens", "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        ("temperature", "Unsupported value: 'temperature' does not support 0 with this model."),
        ("temperature", "temperature is deprecated for this model."),  # Claude
        ("temperature", "invalid temperature: only 1 is allowed for this model"),  # Kimi
    ],
)
def test_options_that_a_reasoning_model_refuses_are_left_out(option, said, pauses):
    def reply(message, n, body):
        error = json.dumps({"error": {"message": said}}).encode()
        return (400, error) if option in body else chat(WALK)

    with server(reply) as (url, requests):
        assert [c.text for c in ask_server(url, *"ab")] == [WALK] * 2
    assert sorted(r[2].get("max_completion_tokens", 0) for r in requests) == [0, 0, 100, 100]
    assert not pauses


def test_the_cache_tells_urls_models_and_lengths_apart(pauses):
    with server(lambda *_: chat(WALK)) as (url, requests):
        for n, settings in enumerate([{}, {"critic_model": "b"}, {"critic_max_tokens": 7}], 1):
            for _ in range(2):
                assert ask_server(url, "a", **settings)[0].text and len(requests) == n
        ask_server(url.replace("v1", "v2"), "a")
        assert len(requests) == 4


def test_a_message_is_answered_once_for_all_critics_of_one_identity(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def ask(identity, *messages, failure=""):
        def complete(new):
            asked[:] = new
            yield from [({"empty": "", "lost": None}.get(m, tagged(m)), failure) for m in new]

        asked.clear()
        answers = critic.cached(complete, identity)([ROLLOUT] * len(messages), messages)
        texts = [tagged(m) if m in "abcd" and not failure else None for m in messages]
        assert [a.text for a in answers] == texts
        return asked

    assert ask("judge", "a", "b", "a", "empty") == ["a", "b", "empty"]
    assert ask("judge", "empty", "b", "c", "a") == ["empty", "c"]  # no failure is kept
    assert ask("judge", "c", "a") == []
    assert ask("other", "c", "a") == ["c", "a"]
    assert ask("judge", "d", failure="cut off") == ["d"] == ask("judge", "d")
    with pytest.raises(UserError, match="no reply"):
        ask("judge", "lost", failure="no reply")
    assert ask("judge", "lost", "empty", failure="no reply") == ["lost", "empty"]  # one arrived


def test_two_writers_of_a_file_do_not_meet_and_a_failed_one_leaves_nothing(tmp_path):
    def write(n):
        with critic.atomic_write(tmp_path / "file") as file:
            file.write(b"%d" % n * 9)

    with ThreadPool(8) as pool:
        pool.map(write, range(400))
    assert len(set((tmp_path / "file").read_text()[::3])) <= 3
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(KeyboardInterrupt), critic.atomic_write(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_local_critic_is_greedy_and_never_the_trained_solver(tmp_path, make_config, monkeypatch):
    """With the solver's own weights it answers as the base, however far the student has come."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(critic, "parse_critique", lambda text, rollout: Critique(text))
    monkeypatch.setattr(sd, "generate", generate := Mock(wraps=sd.generate))
    ends = [1, *range(4, 60)]  # so that some answers end
    limit = "the reply is cut off: --critic-max-tokens 6"
    for seed, name in (2, "solver"), (3, "other"):
        save_model(name, byte_tokenizer(), ends=ends, seed=seed, max_position_embeddings=48)
        cfg = make_config(critic=name, model="solver", critic_max_tokens=6)
        messages, expected = ["What?", "Which one of the two?", "Why?", "Who is it?", "When?"], []
        plain, tokenizer = sd.load_model(name, "cpu", "float32")
        for message in messages:
            [ids] = sd.encode_chats(tokenizer, [message])
            row = plain.generate(torch.tensor([ids]), max_new_tokens=6)[0, len(ids) :].tolist()
            text = tokenizer.decode(row[:-1] if row[-1] in ends else row)
            usable = row[-1] in ends and len(ids + row) <= 48  # the second ends, but beyond them
            failure = ("" if text else "empty reply") if usable else limit
            expected.append(Critique(None, failure, text) if failure else Critique(text))
        assert {"", limit} <= {critique.failure for critique in expected}
        model, tokenizer = sd.load_model("solver", "cpu", "float32")
        ask = sd.open_critic(cfg, model, tokenizer)
        for adapter in sd.add_adapters(model, 4, 8.0):
            adapter.data.add_(0.5)
        assert ask([ROLLOUT] * 5, messages) == expected and sd.LoRALinear.enabled
        assert generate.call_args.args[-1] == 0
        generate.reset_mock()
        usable = {m: e for m, e in zip(messages, expected, strict=True) if e.text}
        assert ask([ROLLOUT] * len(usable), [*usable]) == [*usable.values()]  # from the cache
        assert not generate.called
        cfg.critic_max_tokens = 7
        sd.open_critic(cfg, model, tokenizer)([ROLLOUT], [*usable][:1])
        assert generate.called
