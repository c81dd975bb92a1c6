"""Critics that are models: over HTTP, against a real server that behaves in every bad way; and in process."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import critic
import sd
from critic import Critique, Stop

PROBLEM = sd.Problem("3*7+8*4", "<step_1>×84→2</step_1><step_2>×37→1</step_2><step_3>⊕21→3</step_3><answer>3</answer>", "3")
WALK = "<step_1>3*7=1</step_1><step_2>8*4=2</step_2><step_3>1+2=3</step_3><answer>3</answer>"


def completion(text, **more):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice | more], "usage": {"total_tokens": 50}}


@contextmanager
def server(answer):
    """A server on this machine; answer(handler, request's JSON) writes the reply. Yields (its URL, the requests)."""
    requests, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append((self.path, dict(self.headers), body))
                number = len(requests)
            try:
                answer(self, body, number)
            except (BrokenPipeError, ConnectionResetError):
                pass

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1", requests
    finally:
        httpd.shutdown()
        httpd.server_close()


def send(handler, content, status=200, length=None):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)


def ask(url, prompts=("one",), at_once=4, timeout=5.0):
    answers = critic.http_critic(url, "judge", 100, at_once, timeout)
    return [critique for _, critique in sorted(answers(list(prompts)), key=lambda pair: pair[0])]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch, tmp_path):
    monkeypatch.setattr(critic, "PAUSES", (0.01, 0.02))
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------ over HTTP
def test_the_request_is_greedy_and_names_the_model_and_carries_the_key(monkeypatch):
    monkeypatch.setenv("CRITIC_API_KEY", "secret")
    with server(lambda h, body, n: send(h, completion(WALK))) as (url, requests):
        assert ask(url + "/") == [Critique(WALK, "", 50)]
    [(path, headers, body)] = requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "judge" and body["temperature"] == 0 and body["max_tokens"] == 100
    assert body["messages"] == [{"role": "user", "content": "one"}]


def test_several_requests_are_under_way_at_once_and_answers_keep_their_places():
    together = threading.Barrier(4)

    def wait_for_the_others(handler, body, n):
        together.wait(10)  # one after another, they would wait in vain
        send(handler, completion(body["messages"][0]["content"].upper()))

    with server(wait_for_the_others) as (url, _):
        assert [c.text for c in ask(url, "abcdefgh", at_once=4, timeout=20)] == list("ABCDEFGH")


@pytest.mark.parametrize(
    "written, read",
    [
        ("<think>so <step_1>1</step_1></think>\n" + WALK, WALK),
        ("so it is</think>" + WALK, WALK),  # the template opened the thinking in the prompt
        ("a\ud800b", "a?b"),
    ],
)
def test_thinking_is_stripped_and_half_characters_are_replaced(written, read):
    with server(lambda h, body, n: send(h, completion(written))) as (url, _):
        assert ask(url)[0].text == read


def test_a_server_that_recovers_is_asked_again():
    def moody(handler, body, number):
        send(handler, completion(WALK)) if number == 3 else send(handler, b"overloaded", 503 if number == 1 else 429)

    with server(moody) as (url, requests):
        assert ask(url)[0].text == WALK and len(requests) == 3


def drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def flood(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(2**30))
    handler.end_headers()
    for _ in range(2**10):
        handler.wfile.write(b" " * 2**20)


BAD = {  # what a server does -> (what is said of it, how often it is asked)
    "html": (lambda h: send(h, b"<html>Welcome</html>"), "no chat completion", 1),
    "nothing": (lambda h: send(h, b""), "no chat completion", 1),
    "another shape": (lambda h: send(h, {"choices": []}), "no chat completion", 1),
    "a number": (lambda h: send(h, 3), "no chat completion", 1),
    "null content": (lambda h: send(h, completion(None)), "no chat completion", 1),
    "deep json": (lambda h: send(h, b"[" * 100_000), "no chat completion", 1),
    "not utf-8": (lambda h: send(h, b'{"choices": "\xff"}'), "no chat completion", 1),
    "wrong path": (lambda h: send(h, b"no such page", 404), "HTTP 404", 1),
    "500": (lambda h: send(h, b"oops", 500), "HTTP 500", 3),
    "half a body": (lambda h: send(h, b'{"choices"', length=1000), "", 3),
    "closes": (lambda h: h.connection.close(), "", 3),
    "never answers": (lambda h: time.sleep(3), "timed out", 3),
    "never ends": (drip, "does not come to an end", 3),
    "a gigabyte": (flood, "no chat completion", 1),
    "cut off": (lambda h: send(h, completion("<step_1>", finish_reason="length")), "cut off after 100 tokens", 1),
}


@pytest.mark.parametrize("behaviour", BAD)
def test_a_bad_answer_is_a_failure_of_that_rollout_and_never_a_text(behaviour):
    act, said, times = BAD[behaviour]

    def answer(handler, body, number):
        send(handler, completion(WALK)) if body["messages"][0]["content"] == "fine" else act(handler)

    with server(answer) as (url, requests):
        bad, fine = ask(url, ("bad", "fine"), timeout=0.5 if "never" in behaviour else 20)
    assert bad.text is None and said in bad.failure and "\n" not in bad.failure and bad.failure
    assert fine.text == WALK and len(requests) == times + 1


def test_a_key_that_is_refused_stops_the_program():
    with server(lambda h, body, n: send(h, b"", 401)) as (url, requests):
        with pytest.raises(Stop, match="refuses the key.*CRITIC_API_KEY"):
            ask(url, "abc", at_once=1)


def test_a_server_that_answers_nothing_at_all_stops_the_program(tmp_path):
    with server(lambda h, body, n: send(h, b"")) as (url, _):
        pass  # it is gone now
    asking = critic.remembering(critic.http_critic(url, "judge", 100, 4, 5.0), url, tmp_path / "critic.jsonl")
    with pytest.raises(Stop, match=f"{url} answered none of 2 prompts: .*refused"):
        asking(["", ""], ["", ""], ["one", "two"])


# ------------------------------------------------------------------------ what is remembered
def test_an_answer_is_paid_for_once_also_after_a_line_that_was_cut_short(tmp_path):
    asked = []

    def answers(prompts):
        for n, prompt in enumerate(prompts):
            asked.append(prompt)
            yield n, Critique(None, "lost") if prompt == "c" and len(asked) < 4 else Critique(prompt.upper(), "", 7)

    file = tmp_path / "deep" / "critic.jsonl"
    first = critic.remembering(answers, "judge", file)
    assert [c.text for c in first([""] * 4, [""] * 4, ["a", "b", "a", "c"])] == ["A", "B", "A", None]
    assert asked == ["a", "b", "c"]
    file.write_text(file.read_text() + '{"prompt": "half')
    again = critic.remembering(answers, "judge", file)
    assert again([""] * 3, [""] * 3, ["c", "b", "d"]) == [Critique("C", "", 7), Critique("B", "", 7), Critique("D", "", 7)]
    assert asked == ["a", "b", "c", "c", "d"]  # a failure is asked again
    third = critic.remembering(answers, "judge", file)
    assert [c.text for c in third([""] * 2, [""] * 2, ["c", "d"])] == ["C", "D"] and len(asked) == 5


# ------------------------------------------------------------------------ in process
def test_a_local_critic_is_greedy_batched_and_says_what_was_cut_off(tiny):
    model, tokenizer = tiny
    prompts = ["3*7", "1*5+8*8", "2*2+3*3+4*4"]
    one = dict(critic.local_critic(model, tokenizer, 20, 1)(prompts))
    batched = dict(critic.local_critic(model, tokenizer, 20, 3)(prompts))
    assert one == batched
    for n, prompt in enumerate(prompts):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False)
        row = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=20)[0, len(ids) :].tolist()
        ended = tokenizer.eos_token_id in row
        assert (one[n].text is not None) is ended and ("cut off" in one[n].failure) is not ended
        assert one[n].tokens == len(ids) + len(row)
        if ended:
            assert one[n].text == tokenizer.decode(row, skip_special_tokens=True).strip()


def test_a_prompt_that_does_not_fit_the_critic_is_a_failure(tiny):
    model, tokenizer = tiny
    model.config.max_position_embeddings = 30
    short, long = [c for _, c in sorted(critic.local_critic(model, tokenizer, 20, 2)(["3*7", "3*7+" * 20]), key=lambda p: p[0])]
    assert "fit" in long.failure and "fit" not in short.failure


@pytest.mark.parametrize("shared", [True, False])
def test_the_solvers_own_base_may_be_the_critic(shared, tiny, tiny_folder, config, tmp_path):
    """With the same weights, and never with the adapters on: what it says does not change as the student learns."""
    model, tokenizer = tiny
    cfg = config(critic=str(tiny_folder), critic_max_tokens=9)
    before = dict(critic.local_critic(model, tokenizer, 9, 8)(["3*7", "1*5"]))
    for adapter in sd.add_adapters(model, 4, 8.0):
        adapter.data.add_(0.5)
    ask = sd.open_critic(cfg, str(tiny_folder) if shared else "another", model, tokenizer)
    assert ask([""] * 2, [""] * 2, ["3*7", "1*5"]) == [before[0], before[1]]
    assert all(m.enabled for m in model.modules() if isinstance(m, sd.LoRALinear))


# ------------------------------------------------------------------------ what becomes of it in a step
def rollout(text, reward=0.0):
    return sd.Rollout(PROBLEM, [1], [1], text, reward, 0.0)


WRONG = WALK.replace("8*4=2", "8*4=5").replace("1+2=3", "1+5=6").replace("r>3", "r>6")


@pytest.mark.parametrize(
    "text, failure",
    [
        (WALK, ""),
        ("It is right.", "no steps"),
        ("<step_1>3*7=1</step_1>", "no answer"),
        (WRONG, "wrong answer"),
        (None, "timed out"),
    ],
)
def test_a_critique_is_checked(text, failure, tiny):
    [r] = rollouts = [rollout(WRONG)]
    sd.ask_critic(rollouts, lambda *_: [Critique(text, "" if text else "timed out", 9)], tiny[1])
    assert r.critic_failure == failure and r.critic_tokens == 9 and r.critique == (None if failure else text)


def test_what_a_critic_is_shown():
    prompt = sd.critic_prompt(PROBLEM, WRONG)
    assert prompt.startswith(sd.CRITICISE) and all(f"\n{letter}. " in prompt for letter in "ABCD")
    assert prompt.endswith(f"Problem:\n{PROBLEM.problem}\n\nReference solution:\n{PROBLEM.solution}\n\nRight answer:\n3\n\nStudent's attempt:\n{WRONG}")


@pytest.mark.parametrize(
    "attempt, critique, pasted, repeated",
    [
        (WRONG, WALK, 0, 0),
        (WRONG, PROBLEM.solution, 1, 0),
        (WRONG, PROBLEM.solution.replace("</step_1>", "</step_1>\n"), 1, 0),
        (WRONG, WRONG.replace("r>6", "r>3"), 0, 1),  # the wrong step, and another answer
        (WALK, WALK, 0, 0),
        ("<step_1>3*7=1</step_1>", WALK, 0, 0),  # unfinished, and rightly continued
    ],
)
def test_a_critique_that_pastes_the_reference_or_repeats_the_wrong_step_is_counted(attempt, critique, pasted, repeated):
    r = rollout(attempt, float(sd.is_correct(attempt, "3")))
    r.critique = critique
    metrics = sd.step_metrics([r], 0.0, 0.0)
    assert (metrics["critic_pasted"], metrics["critic_repeated"]) == (pasted, repeated)


def run(folder, model, *more):
    base = f"--out {folder} --model {model} --steps 2 --problems-per-step 2 --eval-every 1 --val-samples 1 --test-samples 1"
    try:
        sd.main([*base.split(), *"--max-new-tokens 6 --lora-rank 2 --device cpu".split(), *more])
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_run_with_a_server_masks_what_failed_and_asks_nothing_twice(tmp_path, tiny_folder, monkeypatch):
    """Half of the requests fail: their rollouts are masked and counted. The run again costs only those."""
    monkeypatch.setenv("CRITIC_API_KEY", "sk-very-secret")
    seen = {}

    def answer(handler, body, number):
        prompt = body["messages"][0]["content"]
        right = prompt.split("Right answer:\n")[1][0]
        fails = seen.setdefault(prompt, len(seen) % 2 == 1)
        send(handler, b"<html>", 200) if fails else send(handler, completion(f"<step_1>1*1=1</step_1><answer>{right}</answer>"))

    with server(answer) as (url, requests):
        flags = ["--critic", url, "--critic-model", "judge", "--critic-batch", "1"]
        assert run(tmp_path / "one", tiny_folder, *flags) == 0
        asked = len(requests)
        assert run(tmp_path / "two", tiny_folder, *flags) == 0
    steps = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()][1:]
    assert [(m["masked"], m["critic_failed"], m["critic_tokens"]) for m in steps] == [(0.5, 0.5, 50)] * 2
    samples = [json.loads(line) for line in (tmp_path / "one" / "samples.jsonl").read_text().splitlines()]
    assert {s["critic_failure"] for s in samples} == {"", "its answer is no chat completion"}
    assert len(requests) - asked <= asked / 2 + 1
    assert (tmp_path / "one" / "metrics.jsonl").read_text() == (tmp_path / "two" / "metrics.jsonl").read_text()
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"very-secret" not in file.read_bytes()


def test_a_server_that_is_not_there_leaves_nothing_behind(tmp_path, tiny_folder, capsys):
    with server(lambda h, body, n: None) as (url, _):
        pass  # it is gone now
    assert run(tmp_path / "run", tiny_folder, "--critic", url, "--critic-model", "judge") == 2
    assert "answered none of 2 prompts" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_server_that_dies_stops_the_run_and_it_can_be_resumed(tmp_path, tiny_folder, capsys):
    def answer(handler, body, number):
        right = body["messages"][0]["content"].split("Right answer:\n")[1][0]
        send(handler, completion(f"<step_1>1*1=1</step_1><answer>{right}</answer>"))

    with server(lambda h, body, n: answer(h, body, n) if n <= 4 else send(h, b"", 500)) as (url, _):
        flags = ["--critic", url, "--critic-model", "judge"]
        assert run(tmp_path / "run", tiny_folder, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "answered none of 2 prompts: HTTP 500" in error and "--resume" in error
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1
    with server(answer) as (other, _):  # a resumed run may find the critic elsewhere only by its own address
        assert run(tmp_path / "run", tiny_folder, "--critic", other, "--critic-model", "judge", "--resume") == 2
    assert "another critic" in capsys.readouterr().err
