"""Answers are compared by value, not by spelling."""

import pytest

import critic

SAME = [  # (one spelling, another)
    ("1/2", "0.5"), ("1/2", ".5"), ("1/2", "0.50"), ("1/2", "50%"), ("1/2", r"50\%"), ("1/2", "50 %"),
    ("1/2", r"\frac12"), ("1/2", r"\frac{1}{2}"), ("1/2", r"\dfrac{1}{2}"), ("1/2", r"\tfrac 1 2"), ("1/2", "2/4"),
    ("1/2", r"$\frac{1}{2}$"), ("1/2", r"\(\frac{1}{2}\)"), ("1/2", r"\boxed{\frac{1}{2}}"), ("1/2", r"\boxed{0.5}."),
    ("-1/2", r"-\frac{1}{2}"), ("-1/2", r"\frac{-1}{2}"), ("-1/2", "−0.5"), ("3/2", "1 1/2"), ("3/2", r"1\frac{1}{2}"),
    ("3/2", r"1\frac12"), ("-3/2", "-1 1/2"), ("1234", "1,234"), ("1234", "1{,}234"), ("1234", r"1\,234"),
    ("1234567", "1,234,567"), ("1234.5", "1,234.50"), ("12", "$12"), ("12", r"\$12"), ("12", "$12$"), ("12", "$12.00"),
    ("12", "12 dollars"), ("12", "€12"), ("-3", "−3"), ("-3", "- 3"), ("3", "+3"), ("3", "3."), ("3", "3.0"),
    ("3", "003"), ("3", " 3 \n"), ("3", "The answer is 3."), ("3", "the final answer is: 3"), ("3", "x = 3"),
    ("3", "x=3."), ("3", r"\boxed{x = 3}"), ("3", "3 apples"), ("3", "3 apples."), ("3", "There are 3 apples left"),
    ("5", r"5\text{ cm}"), ("5", r"5 \mathrm{cm}^2"), ("5", "5 cm^2"), ("90", r"90^\circ"), ("90", r"90^{\circ}"),
    ("90", "90°"), ("3", r"\boxed{\boxed{3}}"), ("3", "**3**"), ("0", "-0"), ("0", "0.0"),
    ("(1,2)", "( 1, 2 )"), ("(1,2)", r"\left(1, 2\right)"), ("{1,2}", "{1, 2}"), ("(1,2)", "The answer is (1, 2)."),
    (r"\frac{x}{2}", r"\dfrac{x}{2}"), (r"\{1,2\}", r"\boxed{\{1, 2\}}"), (r"\sqrt{2}", r"$\sqrt{2}$"),
    (r"2\sqrt{3}", r"\boxed{2\sqrt{3}}"), ("x+1", "x + 1"), ("no solution", "No solution."), ("Friday", "friday"),
    ("1" * 400, "1" * 400 + ".0"),
]  # fmt: skip
OTHER = [
    ("1/2", "1/3"), ("0.5", "50"), ("50", "50%"), ("1", "1/0"), ("3", "-3"), ("12", "1 2"), ("3", "2x"), ("1", "x+1"),
    ("1234", "12,34"), ("(1,2)", "(2,1)"), ("(1,2)", "1,2"), ("{1,2}", "{2,1}"), ("(1/2,3)", "(0.5,3)"), ("3", "3 or 4"),
    ("3", "three"), ("3", ""), ("", "0"), ("3", "٣"), ("10", "1e1"), ("8", "2^3"), ("3", "0x3"), ("5", r"\boxed{}5"),
    ("5", "__import__('os')"), ("1", "True"), ("12", "12 - 5"), ("3", "3 hours 20 minutes"), ("1/3", "0.333"),
]  # fmt: skip


@pytest.mark.parametrize("one, another", SAME)
def test_spellings_of_one_value_agree(one, another):
    assert critic.canonical(one) == critic.canonical(another)
    assert critic.is_correct(f"<answer>{another}</answer>", one) and critic.is_correct(f"<answer>{one}</answer>", another)


@pytest.mark.parametrize("one, another", OTHER)
def test_other_values_do_not(one, another):
    assert critic.canonical(one) != critic.canonical(another)


@pytest.mark.parametrize("completion", ["", "3", r"\boxed{3}", "<answer>", "<answer>3", "<answer></answer>", "<step_1>3</step_1>"])
def test_an_answer_that_is_not_in_its_tags_is_wrong_and_no_error(completion):
    assert not critic.is_correct(completion, "3")


@pytest.mark.parametrize(
    "completion, kept",
    [
        ("<step_1>a</step_1> <step_2>b</step_2>\n<answer>3</answer>", True),
        ("<step_1>a</step_1><answer>3</answer>", True),
        ("<answer>3</answer>", False),
        ("<step_1>a</step_1><step_3>b</step_3><answer>3</answer>", False),
        ("<step_1>a</step_1>", False),
        ("<step_1>a<answer>3</answer>", False),
    ],
)
def test_keeps_format(completion, kept):
    assert critic.keeps_format(completion) is kept
