"""The list of deliberate mistakes: each can still be made, and what becomes of it is told."""

import ast

import pytest

from benchmarks import mutants
from tests.helpers import REPOSITORY
from tests.helpers.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_each_mistake_can_still_be_made(mutant):
    """In code, not in a comment, and such that Python can read it."""
    right = (REPOSITORY / "spvit_jax" / mutant.file).read_text()
    wrong = mutant.source(REPOSITORY)
    assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(right))
    file, _, name = mutant.test.partition("[")[0].partition("::")
    assert f"\ndef {name}(" in (REPOSITORY / "tests" / file).read_text()


def test_each_mistake_is_in_the_list_once():
    assert len({str(mutant) for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.fixture
def tree(tmp_path):
    """A package of two functions, of which only one is tested."""
    (tmp_path / "spvit_jax").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "spvit_jax" / "functions.py").write_text(
        "def double(x):\n    return 2 * x\n\n\ndef triple(x):\n    return 3 * x\n"
    )
    (tmp_path / "tests" / "test_functions.py").write_text(
        "from spvit_jax.functions import double\n\n\ndef test_it():\n    assert double(2) == 4\n"
    )
    return tmp_path


def mutant(old, new, test="test_functions.py"):
    return Mutant(f"{new} for {old}", "functions.py", old, new, test)


def test_what_no_test_sees_survives_and_the_tree_is_left_alone(tree, capsys):
    files = {path: path.read_text() for path in tree.rglob("*.py")}
    seen, unseen = mutant("2 * x", "3 * x"), mutant("3 * x", "4 * x")
    assert mutants.survivors([seen, unseen], tree) == [unseen]
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("killed by tests/test_functions.py::test_it")
    assert second.endswith("SURVIVED")
    assert {path: path.read_text() for path in tree.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (mutant("5 * x", "6 * x"), "expected '5 [*] x' once in the file, found it 0 times"),
        (mutant("return", "assert"), "found it 2 times"),
        (mutant("2 * x", "3 * x", "test_functions.py::test_none"), "no tests ran|not found"),
    ],
)
def test_a_mutant_that_cannot_be_judged_is_neither_killed_nor_alive(tree, mistake, words):
    with pytest.raises((ValueError, RuntimeError), match=words):
        mutants.survivors([mistake], tree)


def test_tests_that_fail_anyway_prove_nothing(tree):
    (tree / "spvit_jax" / "functions.py").write_text("def double(x):\n    return 2 * x - 2\n")
    with pytest.raises(RuntimeError, match="test_it fails without any mistake"):
        mutants.survivors([mutant("2 * x", "3 * x")], tree)


@pytest.mark.parametrize(("alive", "code"), [([], 0), (MUTANTS[:1], 1)])
def test_the_command_fails_when_one_survives(alive, code, monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr(mutants, "survivors", lambda some: chosen.extend(some) or list(alive))
    with pytest.raises(SystemExit) as exit_code:
        mutants.main(["mutants", "BatchNorm's momentum"])
    assert exit_code.value.code == code
    assert chosen == [MUTANTS[0]]
    assert capsys.readouterr().out == f"{1 - code} of 1 mutants killed\n"
