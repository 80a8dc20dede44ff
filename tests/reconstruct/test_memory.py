"""Memory is planned, adapts to what is free, and running out is an answer and not an end."""

import cv2
import numpy as np
import psutil
import pytest
import torch

from capture.errors import NoSpaceError, SomeFailedError
from capture.stack import FocalStack
from reconstruct import batch, infer, memory
from reconstruct.infer import Settings, reconstruct
from reconstruct.job import Job
from tests.reconstruct.small_stack import write_small_stack

SIZE = {"height": 4000, "width": 6000, "n_frames": 5, "step": 3, "tile_px": 768, "halo_px": 64}
CPU = Settings(device="cpu", align=False)


@pytest.fixture(scope="module")
def stack_file(tmp_path_factory):
    return write_small_stack(tmp_path_factory.mktemp("memory") / "small.h5")


def pretend_free(monkeypatch, gigabytes):
    monkeypatch.setattr(memory, "free_bytes", lambda: int(gigabytes * 1e9))


def test_tiles_shrink_with_the_free_memory(monkeypatch):
    sides = []
    for gigabytes in (64, 3.0, 2.5):
        pretend_free(monkeypatch, gigabytes)
        plan = memory.plan(**SIZE)
        assert plan.needed_bytes < plan.free_bytes
        sides.append(plan.tile_px)
    assert sides[0] == 768
    assert sides == sorted(sides, reverse=True) and sides[-1] < 768


def test_what_belongs_to_the_whole_picture_goes_to_disk_where_memory_is_short(monkeypatch):
    pretend_free(monkeypatch, 64)
    roomy = memory.plan(**SIZE | {"step": 1})
    pretend_free(monkeypatch, 5)
    tight = memory.plan(**SIZE | {"step": 1})
    assert roomy.file_bytes == 0
    assert tight.file_bytes == roomy.scratch_bytes > 6e9
    assert "6.1 GB in " in str(tight)


def test_scratch_is_the_same_in_memory_and_in_a_file():
    scratch = memory.Scratch(1000)
    arrays = [scratch.empty((4, 50)) for _ in range(2)]
    assert [isinstance(array, np.memmap) for array in arrays] == [False, True]
    for array in arrays:
        array[:] = np.arange(200).reshape(4, 50)
    np.testing.assert_array_equal(*arrays)


def test_a_disk_without_room_is_one_sentence():
    with pytest.raises(NoSpaceError, match=r"no room for 4000000\.0 GB .*TMPDIR"):
        memory.Scratch(0).empty((1000, 1000, 1000, 1000, 1000))


def test_what_cannot_fit_is_refused_with_what_to_lower(monkeypatch):
    pretend_free(monkeypatch, 1)
    with pytest.raises(NoSpaceError, match=r"5 frames of 6000 x 4000 px need about .* GB .*--workers"):
        memory.plan(**SIZE)


@pytest.mark.parametrize(
    ("free_gb", "free_there_gb", "says"),
    [
        (64, 0.1, r"4000 px need about 0\.2 GB on cuda:1 even .* 0\.1 GB are free there; .*--device cpu"),
        (1, 80, r"4000 px need about 1\.3 GB even in .* 1\.0 GB are free; .*--workers"),
        (1, 0.1, "on cuda:1"),
    ],
)
def test_the_memory_that_is_short_is_named(monkeypatch, free_gb, free_there_gb, says):
    pretend_free(monkeypatch, free_gb)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_there_gb * 1e9), int(80e9)))
    with pytest.raises(NoSpaceError, match=says):
        memory.plan(**SIZE, network=True, device=torch.device("cuda", 1))


def test_workers_share_the_memory(monkeypatch):
    pretend_free(monkeypatch, 64)
    monkeypatch.setattr(memory, "limit_bytes", lambda: int(6e9))
    assert memory.plan(**SIZE).tile_px > memory.plan(**SIZE, share=0.45).tile_px


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_errors_that_mean_no_memory(error, expected):
    assert memory.ran_out(error) is expected


@pytest.mark.parametrize("make", [torch.empty, np.empty, lambda n: cv2.resize(np.zeros((9, 9)), (1 << 30, 1 << 20))])
def test_what_the_libraries_raise_means_no_memory(make):
    with pytest.raises((MemoryError, RuntimeError, cv2.error)) as caught:
        make(1 << 50)
    assert memory.ran_out(caught.value), caught.value


def test_no_memory_is_tried_once_more_with_smaller_tiles(stack_file, monkeypatch):
    sides = []
    real = infer._estimate_tiled

    def short_of_memory(picture, method, refine_steps, tile_px, progress):
        sides.append(tile_px)
        if tile_px == infer.TILE_PX:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")
        return real(picture, method, refine_steps, tile_px, progress)

    monkeypatch.setattr(infer, "_estimate_tiled", short_of_memory)
    with FocalStack.open(stack_file) as stack:
        answer = reconstruct(stack, CPU)
    assert sides == [infer.TILE_PX, infer.TILE_PX // 4]
    assert answer.metric


def test_a_stack_without_memory_is_named_and_the_next_one_done(stack_file, tmp_path, monkeypatch):
    second = write_small_stack(tmp_path / "second.h5", seed=1)
    real = infer._estimate_tiled

    def short_of_memory(picture, *rest):
        if picture.stack.path == stack_file:
            raise MemoryError
        return real(picture, *rest)

    monkeypatch.setattr(infer, "_estimate_tiled", short_of_memory)
    with pytest.raises(SomeFailedError, match="1 of 2 stacks failed: small"):
        batch.run([str(stack_file), str(second)], Job(str(tmp_path / "out"), CPU))
    assert (tmp_path / "out/second/depth.npy").exists()


def test_what_will_be_used_is_said_once(stack_file, tmp_path, capsys):
    second = write_small_stack(tmp_path / "second.h5", seed=1)
    batch.run([str(stack_file), str(second)], Job(str(tmp_path / "out"), CPU))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memory:")]
    assert len(lines) == 1 and "tiles of 768 px" in lines[0]


def test_the_machine_has_memory():
    assert 0 < memory.free_bytes() <= memory.limit_bytes()


GROUP_FILES = {
    2: ("memory.max", "memory.current", "memory.stat", "inactive_file 300000000\n"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "cache 1\ntotal_inactive_file 300000000\n"),
}


def make_group(folder, version, limit, used):
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, used_name, stat_name, stat = GROUP_FILES[version]
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / used_name).write_text(f"{used}\n")
    (folder / stat_name).write_text(stat)


@pytest.fixture
def hierarchy(tmp_path, monkeypatch):
    """A machine without control groups so far, and the file that says which ones this process is in."""
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "self")
    return tmp_path / "cgroup", tmp_path / "self"


@pytest.mark.parametrize(
    ("version", "own", "root"),
    [(2, "0::/slurm/job_7/step_0\n", ""), (1, "5:cpu,memory:/slurm/job_7/step_0\n1:cpu:/\n0::/\n", "memory")],
)
def test_the_limit_of_a_job_is_found_wherever_it_is_set(hierarchy, version, own, root):
    groups, said = hierarchy
    said.write_text(own)
    assert list(memory._control_groups()) == []
    make_group(groups / root / "slurm/job_7", version, limit=2_000_000_000, used=500_000_000)
    make_group(groups / root / "slurm/job_8", version, limit=1_000_000_000, used=0)  # somebody else's
    assert list(memory._control_groups()) == [(2_000_000_000, 200_000_000)]
    assert memory.limit_bytes() == 2_000_000_000
    assert memory.free_bytes() <= 1_800_000_000
    make_group(groups / root / "slurm/job_7/step_0", version, limit="max" if version == 2 else 1 << 62, used=1)
    make_group(groups / root, version, limit=1_500_000_000, used=1_400_000_000)  # a container's, as it sees it
    assert memory.limit_bytes() == 1_500_000_000
    assert memory.free_bytes() <= 400_000_000


def test_without_control_groups_the_machine_is_the_limit(hierarchy):
    assert list(memory._control_groups()) == []
    assert memory.limit_bytes() == psutil.virtual_memory().total
