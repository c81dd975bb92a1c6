"""The scribe: the paper's four cases, both ways, and attempts that cannot be read."""

import random

import pytest

from critic import OWN, REFERENCE, carry_on, corrected_walk, factors, join_steps, judge, parse_steps, read_step, scribe

PROBLEM = "3*7+8*4+6*6"
RIGHT = join_steps(["3*7=1", "8*4=2", "6*6=6", "1+2=3", "3+6=9"], 9)
RIGHT_REFERENCE = join_steps(["×66→6", "×84→2", "⊕62→8", "×37→1", "⊕81→9"], 9)


def test_both_ways_of_working_end_in_the_same_answer():
    rng = random.Random(1)
    for _ in range(200):
        terms = [(rng.randrange(10), rng.randrange(10)) for _ in range(rng.randint(1, 5))]
        expected = sum(a * b for a, b in terms) % 10
        for ways in [OWN], [REFERENCE], rng.choices([OWN, REFERENCE], k=5):
            steps, answer = carry_on(terms, [], ways)
            assert answer == expected and len(steps) == 2 * len(terms) - 1
    assert join_steps(*carry_on(factors(PROBLEM), [], [OWN])) == RIGHT
    assert join_steps(*carry_on(factors(PROBLEM), [], [REFERENCE])) == RIGHT_REFERENCE


@pytest.mark.parametrize("attempt", [RIGHT, RIGHT_REFERENCE])
def test_case_a_a_right_attempt_is_reproduced(attempt):
    assert corrected_walk(PROBLEM, attempt) == attempt
    assert all(judge(attempt))


def test_case_b_a_missing_step_is_inserted():
    attempt = join_steps(["3*7=1", "8*4=2", "1+2=3", "3+6=9"], 9)  # never says what 6*6 is
    walk = corrected_walk(PROBLEM, attempt)
    assert walk == join_steps(["3*7=1", "8*4=2", "1+2=3", "6*6=6", "3+6=9"], 9)


@pytest.mark.parametrize("kept", range(6))
def test_case_c_an_unfinished_attempt_is_finished(kept):
    whole = parse_steps(RIGHT)
    attempt = RIGHT[: whole[kept].start] + "<step_9>6*"  # stopped in the middle of a step
    assert corrected_walk(PROBLEM, attempt) == RIGHT


@pytest.mark.parametrize("way, right", [(OWN, RIGHT), (REFERENCE, RIGHT_REFERENCE)])
@pytest.mark.parametrize("wrong_step", range(5))
def test_case_d_a_wrong_step_is_rewritten_and_what_stands_before_is_verbatim(way, right, wrong_step):
    true_value = int(parse_steps(right)[wrong_step].text[-1])
    slip = (wrong_step, (true_value + 3) % 10)
    attempt = join_steps(*carry_on(factors(PROBLEM), [], [way], slip=slip))
    walk = corrected_walk(PROBLEM, attempt)
    assert walk == right and walk.startswith(attempt[: parse_steps(attempt)[wrong_step].start])
    # Later steps go on from the wrong value, and are right in themselves.
    assert judge(attempt) == [n != wrong_step for n in range(6)]


def test_a_wrong_answer_after_right_steps_is_rewritten():
    attempt = RIGHT.replace("<answer>9", "<answer>4")
    assert corrected_walk(PROBLEM, attempt) == RIGHT
    assert judge(attempt) == [True] * 5 + [False]


def test_steps_in_another_order_are_kept():
    attempt = join_steps(["6*6=6", "3*7=1", "6+1=7", "8*4=3"], 0)
    assert corrected_walk(PROBLEM, attempt) == join_steps(["6*6=6", "3*7=1", "6+1=7", "8*4=2", "7+2=9"], 9)


@pytest.mark.parametrize("step", ["2*2=4", "3*7=1", "5+5=0"])
def test_a_true_step_that_the_problem_does_not_call_for_is_not_kept(step):
    attempt = join_steps(["3*7=1", step], 9)
    assert corrected_walk(PROBLEM, attempt) == RIGHT


@pytest.mark.parametrize("attempt", ["", "nine", "<answer>9</answer>", "<step_1>what?</step_1>", "<step_1>", "٣*7=1"])
def test_an_attempt_that_cannot_be_read_gets_a_fresh_solution(attempt):
    assert corrected_walk(PROBLEM, attempt) == RIGHT


def test_a_problem_of_another_kind_is_a_failure_and_no_text():
    good, bad = scribe([PROBLEM, "How many sheep?"], [RIGHT, RIGHT], ["", ""])
    assert good.text == RIGHT and not good.failure
    assert bad.text is None and "How many sheep?" in bad.failure


@pytest.mark.parametrize(
    "text, found",
    [
        ("<step_1>a</step_1> x <answer>b</answer>", [("step_1", "a"), ("answer", "b")]),
        ("<step_1><step_2>b</step_2></step_1>", [("step_2", "b")]),
        ("<step_1>a</step_2>", []),
        ("</step_1><step_1>", []),
        ("<step_1>a</step_1><step_1>b</step_1>", [("step_1", "a"), ("step_1", "b")]),
        ("<step_99999>a</step_99999>", []),
    ],
)
def test_parse_steps(text, found):
    steps = parse_steps(text)
    assert [(s.name, s.text) for s in steps] == found
    assert all(text[s.start : s.end] == f"<{s.name}>{s.text}</{s.name}>" for s in steps)


def test_each_step_keeps_its_way():
    """An attempt may mix them; a walk that unified them would be about words, where the error is in a value."""
    attempt = "<step_1>×66→6</step_1><step_2>3*7=2</step_2><step_3>⊕62→8</step_3><step_4>8*4=2</step_4>"
    assert corrected_walk("3*7+8*4+6*6", attempt) == (
        "<step_1>×66→6</step_1><step_2>3*7=1</step_2><step_3>⊕61→7</step_3><step_4>8*4=2</step_4>"
        "<step_5>7+2=9</step_5><answer>9</answer>"  # beyond the attempt: as its last step
    )


@pytest.mark.parametrize("text", ["3×7→1", "*37=1", "3*7→1", "×37=1", "3*7=11", "×377→1", "", "٣*7=1", " 3*7=1"])
def test_read_step_takes_each_way_whole(text):
    assert read_step(text) is None
    assert read_step("3*7=1") == ("*", 3, 7, 1) and read_step("⊕62→8") == ("⊕", 6, 2, 8)


def test_steps_that_slip_into_the_reference_s_way_take_the_last_product_or_the_sum():
    steps, answer = carry_on(factors(PROBLEM), [], [OWN, REFERENCE, REFERENCE, OWN, OWN])
    assert steps == ["3*7=1", "×66→6", "⊕16→7", "8*4=2", "7+2=9"] and answer == 9
