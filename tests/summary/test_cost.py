from pathlib import Path

import pytest

from raphael.summary.cost import A100, BEGIN, END, Gpu, Scenario, Work, cost_of, images_for, main, mfu_of, work_of

DOCS = Path(__file__).parents[2] / "docs"
UNIT = Gpu("unit", 1e12, 3.0)  # a teraflop a second, three dollars an hour


def test_hours_and_money_are_the_arithmetic_of_a_hand():
    """3600 images x (3 x 2 + 1) TFLOP at half of 1 TFLOP/s: 14 h; 1800 images x 0.3 TFLOP at 30 %: 0.5 h."""
    cost = cost_of(Work(2e12, 1e12, 0.3e12), Scenario("", 3600, 1800, UNIT, 0.5))
    assert cost.hours == pytest.approx(14.5) and cost.usd == pytest.approx(43.5)
    assert cost.flop == pytest.approx(3600 * 7e12 + 1800 * 0.3e12)
    again = cost_of(Work(2e12, 1e12, 0.3e12), Scenario("", 3600, 1800, UNIT, 0.5, forwards=4))
    assert again.hours == pytest.approx(18.5)


def test_the_images_that_a_budget_sees_cost_that_budget():
    work = Work(2e12, 1e12, 0.3e12)
    images = images_for(work, Scenario("", 0, 1800, UNIT, 0.5), 43.5)
    assert images == pytest.approx(3600)
    assert images_for(work, Scenario("", 0, 1e9, UNIT, 0.5), 43.5) == 0


def test_a_published_run_comes_out_as_published():
    """MosaicML: 290 images/s of Stable Diffusion 2 at 512 px (0.804 TFLOP) on 8 A100 are 28.0 %"""
    assert mfu_of(Work(0.804e12, 0, 0), 290 * 3600, A100, 8) == pytest.approx(0.280, abs=5e-4)


def test_a_share_above_the_peak_is_refused():
    with pytest.raises(ValueError, match="mfu: got 36.5, expected above 0 and up to 1"):
        Scenario("", 1, 1, UNIT, 36.5)


def test_the_mean_is_over_the_presets_sizes():
    mean, each = work_of("sd-debug")
    assert mean.unet_step == pytest.approx(sum(work.unet_step for work in each.values()) / len(each))
    assert all(work.unet_step > 0 and work.encode > 0 for work in each.values())


def test_the_page_is_written_between_its_marks(tmp_path):
    page = tmp_path / "cost.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["--preset", "sd-debug", "--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| mean |" in text and "GPU hours" in text


@pytest.mark.slow
def test_the_page_in_docs_is_what_the_program_writes(tmp_path):
    page = tmp_path / "cost.md"
    page.write_text((DOCS / "cost.md").read_text())
    main(["--write", str(page)])
    assert page.read_text() == (DOCS / "cost.md").read_text()
