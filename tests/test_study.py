"""The scripts of the study: their statistics and the exchange of spectra."""
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from conftest import ROOT, cloud

sys.path.insert(0, str(ROOT / "study"))

import generalise  # noqa: E402
from generalise import difference, holm, p_value, paired, quantile  # noqa: E402
from why import few_label_accuracies, shared_neighbours, spectrum, with_spectrum  # noqa: E402


def test_the_page_of_accuracies_is_what_its_command_prints(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["generalise.py", "--out", str(tmp_path)])
    generalise.main()
    assert capsys.readouterr().out == (ROOT / "study" / "accuracies.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"generalisation.png",
                                                          "generalisation_all.png"}


def test_students_t_has_the_values_of_its_tables():
    for freedom, t in ((2, 4.303), (4, 2.776), (9, 2.262)):
        assert quantile(0.95, freedom) == pytest.approx(t, abs=1e-3)
    assert quantile(0.99, 4) == pytest.approx(4.604, abs=1e-3)
    assert p_value([1.0, 2.0, 3.0]) == pytest.approx(0.0742, abs=1e-4)  # t = 2 √3


@pytest.mark.parametrize("text, values", [
    ("+4.5 ± 0.7", [4.0, 5.0]),              # t = 9.0, needed 12.71
    ("**+4.2 ± 0.4**", [4.0, 4.5]),          # t = 17
    ("+2.0 ± 1.0", [1.0, 2.0, 3.0]),         # t = 3.46, needed 4.30
    ("**−3.0 ± 1.0**", [-2.0, -3.0, -4.0]),  # t = 5.2
    ("**+1.0 ± 0.1**", [0.9, 1.1] * 10), ("+3.0", [3.0]), ("", [])])
def test_a_difference_is_bold_where_its_95_percent_interval_leaves_out_zero(text, values):
    assert difference(values) == text


def test_differences_are_of_the_same_seed_where_both_were_measured():
    def run(seed, **measured):
        return SimpleNamespace(args=dict(seed=seed), measured=measured)

    systems = [run(1, knn=46.0), run(0, knn=45.0), run(2, knn=9.0), run(3), run(4, knn=1.0)]
    bases = [run(0, knn=40.0), run(1, knn=42.0), run(3, knn=9.0), run(4)]
    assert paired(systems, bases, "knn") == [4.0, 5.0]


def test_holm_multiplies_the_smallest_by_most_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]


def test_exchanged_spectra_change_the_shape_and_nothing_that_a_linear_map_can_read():
    x, other = cloud(200, 6) @ cloud(6, 6, seed=1), cloud(200, 6, seed=2) @ cloud(6, 6, seed=3)
    x, other = x - x.mean(0), other - other.mean(0)
    labels = torch.arange(200) % 4
    wanted = spectrum(other)[0]
    (stretched, _), _ = with_spectrum([(x, labels), (x, labels)], wanted)
    assert_close(spectrum(stretched)[0], wanted, rtol=1e-3, atol=1e-5)
    back = torch.linalg.lstsq(stretched, x).solution
    assert_close(stretched @ back, x, rtol=1e-3, atol=1e-3)
    own, _ = with_spectrum([(x, labels), (x, labels)], spectrum(x)[0])
    assert_close(own[0], x, rtol=1e-3, atol=1e-3)


def test_both_classifiers_of_few_labels_learn_separate_classes():
    labels = torch.arange(400) % 4
    x = 4 * torch.nn.functional.one_hot(labels, 8).float() + cloud(400, 8)
    assert min(few_label_accuracies((x[:200], labels[:200]), (x[200:], labels[200:]))) > 90


def test_shared_neighbours_are_those_found_one_by_one():
    a, b = cloud(60, 8), cloud(60, 8, seed=1)
    near = [[{*sorted({*range(60)} - {i}, key=lambda j, x=x, i=i: -(x[j] @ x[i]) / x[j].norm())[:5]}
             for i in range(60)] for x in (a, b)]
    share = sum(len(one & two) for one, two in zip(*near)) / (5 * 60)
    assert shared_neighbours(a, b, k=5) == pytest.approx(100 * share)
    assert shared_neighbours(a, 3 * a, k=5) == 100
