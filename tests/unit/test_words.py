from orchestrator.words import counted, say_gib


def test_one_is_singular_and_other_numbers_are_plural() -> None:
    assert [counted(number, "trial") for number in (0, 1, 2)] == ["0 trials", "1 trial", "2 trials"]
    assert [counted(number, "row is", "rows are") for number in (1, 3)] == ["1 row is", "3 rows are"]


def test_a_small_size_is_in_mib() -> None:
    assert [say_gib(gib) for gib in (17.342, 0.1, 0.05, 0.001)] == ["17.3 GiB", "0.1 GiB", "51.2 MiB", "1.02 MiB"]
