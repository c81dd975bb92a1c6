"""Problems from a file: the split, and what is said of a bad one."""

import json

import pytest

import sd


def write(path, count, first=0):
    rows = [{"problem": f"problem {n}", "solution": "s", "answer": "1"} for n in range(first, first + count)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return str(path)


def test_the_split_is_disjoint_complete_and_always_the_same(tmp_path):
    cfg = sd.Config(data=write(tmp_path / "all.jsonl", 40))
    sets = sd.problem_sets(cfg)
    assert [len(problems) for problems in sets] == [28, 4, 8] and sets == sd.problem_sets(cfg)
    assert {p.problem for problems in sets for p in problems} == {f"problem {n}" for n in range(40)}
    given = sd.Config(data=cfg.data, val_data=write(tmp_path / "val.jsonl", 3, 40), test_data=write(tmp_path / "test.jsonl", 2, 43))
    assert [len(problems) for problems in sd.problem_sets(given)] == [40, 3, 2]


GOOD = '{"problem": "p", "solution": "s", "answer": "1"}'


@pytest.mark.parametrize(
    "text, said",
    [
        (GOOD + "\n{", "line 2: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"problem": "\\ud800", "solution": "s", "answer": "1"}', "line 1: not JSON"),
        (GOOD + "\n\n[1]", "line 3: expected an object"),
        ('{"problem": "p", "solution": "s"}', '"answer"'),
        ('{"problem": " ", "solution": "s", "answer": "1"}', '"problem"'),
        ('{"problem": "p", "solution": "s", "answer": 1}', '"answer"'),
        (GOOD + "\n" + GOOD, "line 2: this problem is there already"),
        ("", "no problem"),
        (GOOD, "too few"),
        ("\udcff", "cannot read"),
    ],
)
def test_bad_files(tmp_path, text, said):
    path = tmp_path / "data.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(sd.Stop, match=said) as stop:
        sd.problem_sets(sd.Config(data=str(path)))
    assert "data.jsonl" in str(stop.value) and "\n" not in str(stop.value)


def test_sets_that_share_a_problem_or_lack_their_data_are_refused(tmp_path):
    data = write(tmp_path / "a.jsonl", 20)
    with pytest.raises(sd.Stop, match="must differ"):
        sd.problem_sets(sd.Config(data=data, val_data=data))
    with pytest.raises(sd.Stop, match="need --data"):
        sd.problem_sets(sd.Config(val_data=data))
