import pytest

from lightning_distill.hardware import energy
from lightning_distill.hardware.energy import DRAM_NANOJOULES, PICOJOULES


@pytest.mark.chapter("D47", api="lightning_distill.hardware.energy")
def test_energy_of_arithmetic_is_the_golden_one(golden):
    case = golden("energy_simple")
    assert {int(bits): value for bits, value in case.inputs["pj"].items()} == PICOJOULES
    each = [PICOJOULES[int(bits)] for bits in case.inputs["bits"]]
    report = energy(case.inputs["ops"], each)
    assert report.total == report.compute == pytest.approx(case.expected["energy_j"], rel=case.rtol)


@pytest.mark.chapter("D50", api="lightning_distill.hardware.energy")
def test_energy_with_memory_is_the_golden_one(golden):
    case = golden("energy_with_memory")
    report = energy(
        case.inputs["ops"],
        case.inputs["pj_op"],
        bytes_moved=8 * case.inputs["mem_access"],
        access_nanojoules=case.inputs["nj_mem"],
    )
    assert report.compute == pytest.approx(case.expected["compute_j"], rel=case.rtol)
    assert report.memory == pytest.approx(case.expected["memory_j"], rel=case.rtol)
    assert report.total == pytest.approx(case.expected["total_j"], rel=case.rtol)
    ratio = energy(0.0, 0.0, bytes_moved=8.0).memory / energy(1.0, PICOJOULES[32]).compute
    assert ratio == pytest.approx(case.expected["dram_over_fp32_mac"], rel=case.rtol)


@pytest.mark.erratum("ERR-68")
def test_printed_energy_without_memory_leaves_most_of_it_out(golden):
    case = golden("energy_with_memory")
    printed = (case.inputs["ops"] * case.inputs["pj_op"]).sum().item() * 1e-12
    assert printed == pytest.approx(0.4 * case.expected["total_j"])


def test_an_access_moves_eight_bytes_and_is_paid_whole_in_every_layer():
    for moved, accesses in ((1.0, 1), (8.0, 1), (9.0, 2), ([1.0, 9.0], 3)):
        assert energy(0.0, 0.0, bytes_moved=moved).memory == pytest.approx(accesses * DRAM_NANOJOULES * 1e-9)


def test_one_energy_serves_all_layers():
    assert energy([1.0, 2.0], 3.0).total == pytest.approx(9e-12)


@pytest.mark.parametrize("name", ["ops", "picojoules", "bytes_moved", "access_nanojoules"])
def test_bad_input_is_refused(name):
    arguments = {"ops": 1.0, "picojoules": 1.0, name: -1.0}
    with pytest.raises(ValueError, match=rf"`{name}` must be finite and in \[0, inf\], got -1"):
        energy(**arguments)
