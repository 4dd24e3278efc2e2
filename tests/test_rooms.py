"""The rendered rooms are held to geometry: what was written is back-projected, differentiated and measured."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gradsurgery.recipes import rooms

pytestmark = pytest.mark.xdist_group("rooms")

TRAIN, VAL, HEIGHT, WIDTH = 100, 6, 72, 96
CHANNELS = {"image": (3,), "label": (), "depth": (1,), "normal": (3,)}
FLOOR, CEILING = rooms.CLASSES.index("floor"), rooms.CLASSES.index("ceiling")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return rooms.render_rooms(
        tmp_path_factory.mktemp("data") / "rooms", train=TRAIN, val=VAL, height=HEIGHT, width=WIDTH
    )


@pytest.fixture(scope="module")
def views(root):
    """All training views stacked, float64: image (N,H,W,3), label (N,H,W), depth (N,H,W), normal (N,H,W,3)."""
    stacked = {k: np.stack([np.load(root / "train" / k / f"{i}.npy") for i in range(TRAIN)]) for k in CHANNELS}
    stacked["depth"] = stacked["depth"][..., 0]
    return {k: v.astype(np.float64) for k, v in stacked.items()}


def rays(root, height, width):
    """Viewing directions (H,W,3) with unit z, from the written intrinsics and nothing else."""
    k = json.loads((root / "rooms.json").read_text())["intrinsics"]
    v, u = np.mgrid[:height, :width]
    return np.stack([(u - k["cx"]) / k["fx"], (v - k["cy"]) / k["fy"], np.ones((height, width))], -1)


def differentiated(depth, label, ray, tolerance):
    """Normals (H-2,W-2,3) by central differences of back-projected points, and where the five points share a plane.

    On a plane inverse depth is affine in the pixel coordinates, whatever the plane: its second differences vanish.
    """
    point = ray * depth[..., None]
    inverse = 1 / np.where(depth > 0, depth, np.nan)
    middle, up, down = np.s_[1:-1, 1:-1], np.s_[:-2, 1:-1], np.s_[2:, 1:-1]
    left, right = np.s_[1:-1, :-2], np.s_[1:-1, 2:]
    # Rows run down and columns right, so the cross product points away from the camera; its negative faces it.
    normal = -np.cross(point[right] - point[left], point[down] - point[up])
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-30)
    flat = np.ones_like(depth[middle], dtype=bool)
    for a, b in ((up, down), (left, right)):
        bend = np.abs(inverse[a] + inverse[b] - 2 * inverse[middle])
        flat &= (bend < tolerance * inverse[middle]) & (label[a] == label[middle]) & (label[b] == label[middle])
    return normal, flat


def degrees_between(a, b):
    """Angle in degrees, from the chord: arccos has no digits left near zero."""
    return np.rad2deg(2 * np.arcsin(np.clip(np.linalg.norm(a - b, axis=-1) / 2, 0, 1)))


def files(root):
    return {p.relative_to(root): (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*") if p.is_file()}


def test_layout_shapes_and_dtypes(root):
    assert sorted(p.name for p in root.iterdir()) == ["rooms.json", "train", "val"]
    for split, count in (("train", TRAIN), ("val", VAL)):
        assert {p.name for p in (root / split).iterdir()} == set(CHANNELS)
        for kind, channels in CHANNELS.items():
            assert {p.name for p in (root / split / kind).iterdir()} == {f"{i}.npy" for i in range(count)}
            for path in (root / split / kind).iterdir():
                array = np.load(path)
                assert array.shape == (HEIGHT, WIDTH, *channels)
                assert array.dtype == np.float32


def test_float64_is_written_on_request(tmp_path):
    made = rooms.render_rooms(tmp_path / "r", train=1, val=0, height=24, width=32, dtype=np.float64)
    assert {np.load(p).dtype for p in made.rglob("*.npy")} == {np.dtype(np.float64)}
    assert not list((made / "val" / "image").iterdir())


def test_value_ranges(views):
    image, depth, normal = views["image"], views["depth"], views["normal"]
    assert all(np.isfinite(v).all() for v in views.values())
    assert image.min() >= 0
    assert image.max() <= 1
    assert set(np.unique(views["label"])) == set(range(-1, 13))
    assert depth.min() == 0
    assert depth[depth > 0].min() > 0.2
    assert depth.max() < 12
    length = np.linalg.norm(normal, axis=-1)
    assert np.all((length == 0) | (np.abs(length - 1) < 1e-6))


def test_holes_and_unlabelled_pixels_are_a_minority_but_there(views):
    no_depth, no_normal = views["depth"] == 0, ~views["normal"].any(-1)
    for missing in (no_depth, no_normal, views["label"] == -1):
        assert 0.02 < missing.mean() < 0.2
        assert missing.mean((1, 2)).max() < 0.5
    assert no_normal[no_depth].all(), "a sensor that has no depth has no normal"
    assert (no_normal & ~no_depth).any()


def test_no_class_is_a_curiosity(views):
    share = np.bincount(views["label"][views["label"] >= 0].astype(int), minlength=13) / views["label"].size
    assert share.min() > 0.003, dict(zip(rooms.CLASSES, share.round(4), strict=True))
    assert share.max() < 0.6
    seen = [(views["label"] == c).any((1, 2)).mean() for c in range(13)]
    assert min(seen) > 0.1


def test_normals_are_the_derivative_of_depth(root, views):
    ray, errors, tested = rays(root, HEIGHT, WIDTH), [], 0
    for depth, label, normal in zip(views["depth"], views["label"], views["normal"], strict=True):
        derived, flat = differentiated(depth, label, ray, 1e-6)
        written = normal[1:-1, 1:-1]
        flat &= written.any(-1)
        errors.append(degrees_between(derived, written)[flat])
        tested += flat.mean() / TRAIN
    error = np.concatenate(errors)
    assert tested > 0.5
    assert np.median(error) < 0.02
    assert (error < 1).mean() > 0.98


def test_normals_are_the_derivative_of_depth_at_full_size(tmp_path):
    made = rooms.render_rooms(tmp_path / "r", train=1, val=0, height=288, width=384, dtype=np.float64)
    image, label, depth, normal = (np.load(made / "train" / k / "0.npy") for k in CHANNELS)
    assert image.shape == normal.shape == (288, 384, 3)
    derived, flat = differentiated(depth[..., 0], label, rays(made, 288, 384), 1e-10)
    flat &= normal[1:-1, 1:-1].any(-1)
    error = degrees_between(derived, normal[1:-1, 1:-1])[flat]
    assert flat.mean() > 0.5
    assert np.median(error) < 1e-6
    assert (error < 1).mean() > 0.99


def test_normals_face_the_camera(root, views):
    ray = rays(root, HEIGHT, WIDTH)
    towards = (views["normal"] * ray).sum(-1)
    assert (towards[views["normal"].any(-1)] < 0).all()


def test_floor_is_one_plane_under_everything_and_the_ceiling_its_parallel(root, views):
    ray, heights, eyes = rays(root, HEIGHT, WIDTH), [], []
    for depth, label, normal in zip(views["depth"], views["label"], views["normal"], strict=True):
        point, known = ray * depth[..., None], normal.any(-1)
        floor, ceiling = known & (label == FLOOR), known & (label == CEILING)
        if floor.sum() < 30:
            continue
        up = normal[floor].mean(0)
        assert degrees_between(normal[floor], up).max() < 1e-3
        offset = point[floor] @ up
        assert np.ptp(offset) < 1e-4, "metres: the floor is one plane"
        above = point[depth > 0] @ up - offset.mean()
        assert above.min() > -1e-4, "nothing reaches below the floor"
        eyes.append(-offset.mean())
        if ceiling.sum() > 30:
            assert degrees_between(normal[ceiling], -up).max() < 1e-3
            height = point[ceiling] @ up - offset.mean()
            assert np.ptp(height) < 1e-4
            assert above.max() < height.mean() + 1e-4
            heights.append(height.mean())
    assert len(eyes) > 60
    assert len(heights) > 20
    assert 1.0 < min(eyes) < max(eyes) < 1.9
    assert 2.2 < min(heights) < max(heights) < 3.2
    assert np.std(heights) > 0.05


def test_walls_stand_upright(views):
    wall = rooms.CLASSES.index("wall")
    for label, normal in zip(views["label"], views["normal"], strict=True):
        known = normal.any(-1)
        floor = known & (label == FLOOR)
        if floor.any():
            up = normal[floor].mean(0)
            assert np.abs(normal[known & (label == wall)] @ up).max(initial=0) < 1e-5


def test_image_is_neither_flat_nor_a_colour_code(views):
    image, label = views["image"], views["label"].astype(int)
    assert image.std((1, 2)).min() > 0.02
    assert 0.2 < image.mean() < 0.7
    assert len(np.unique(image.mean((1, 2, 3)).round(3))) > 50, "exposure varies"
    fit, held = np.arange(TRAIN) < TRAIN // 2, label >= 0
    means = np.stack([image[fit][label[fit] == c].mean(0) for c in range(13)])
    test = held & ~fit[:, None, None]
    nearest = np.linalg.norm(image[test][:, None] - means, axis=-1).argmin(1)
    assert (nearest == label[test]).mean() < 0.5


def test_a_view_depends_on_seed_split_and_index_alone(tmp_path):
    size = {"height": 24, "width": 32}
    few = rooms.render_rooms(tmp_path / "few", train=2, val=1, seed=3, **size)
    more = rooms.render_rooms(tmp_path / "more", train=4, val=2, seed=3, **size)
    other = rooms.render_rooms(tmp_path / "other", train=2, val=1, seed=4, **size)
    for kind in CHANNELS:
        for name in ("train/{}/0.npy", "train/{}/1.npy", "val/{}/0.npy"):
            same = (few / name.format(kind)).read_bytes()
            assert same == (more / name.format(kind)).read_bytes()
            assert same != (other / name.format(kind)).read_bytes()
        distinct = [p.read_bytes() for p in more.glob(f"*/{kind}/*.npy")]
        assert len(set(distinct)) == len(distinct) == 6


def test_render_room_is_a_function_of_its_generator():
    a, b = (rooms.render_room(np.random.default_rng(1), 24, 32) for _ in range(2))
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)
    assert a.depth.shape == (24, 32, 1)
    assert a.label.shape == (24, 32)


def test_furniture_stands_in_the_room():
    for seed in range(60):
        scene = rooms.draw_scene(np.random.default_rng(seed))
        assert 3 <= len(scene.pieces) <= 8
        assert np.all(scene.eye > 0.2)
        assert np.all(scene.eye < scene.size - 0.2)
        for piece in scene.pieces:
            corners = np.concatenate([piece.corners(box) for box in piece.boxes])
            assert corners[:, 2].min() == pytest.approx(0)
            assert corners.min() > -1e-9
            assert (corners < scene.size + 1e-9).all()


def test_a_second_call_renders_nothing(root):
    before = files(root)
    again = rooms.render_rooms(root, train=TRAIN, val=VAL, height=HEIGHT, width=WIDTH)
    assert again == root
    assert files(root) == before


@pytest.fixture
def small(tmp_path):
    return rooms.render_rooms(tmp_path / "small", train=1, val=1, height=12, width=16)


@pytest.mark.parametrize("changed", [{"train": 2}, {"width": 20}, {"seed": 5}, {"dtype": np.float64}])
def test_other_arguments_are_refused_and_nothing_is_touched(small, changed):
    before = files(small)
    with pytest.raises(FileExistsError, match=next(iter(changed))) as caught:
        rooms.render_rooms(small, **{"train": 1, "val": 1, "height": 12, "width": 16, **changed})
    assert str(small) in str(caught.value)
    assert files(small) == before


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": "somebody else"}'])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, content):
    (tmp_path / "thesis.txt").write_text("years of work")
    if content is not None:
        (tmp_path / "rooms.json").write_text(content)
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match="not") as caught:
        rooms.render_rooms(tmp_path, train=1, val=1, height=12, width=16)
    assert str(tmp_path) in str(caught.value)
    assert files(tmp_path) == before


def test_an_interrupted_render_leaves_nothing(tmp_path, monkeypatch):
    render, seen = rooms.render_room, []

    def interrupted(*arguments):
        seen.append(list(tmp_path.rglob("*.npy")))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return render(*arguments)

    monkeypatch.setattr(rooms, "render_room", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rooms.render_rooms(tmp_path / "r", train=4, val=1, height=12, width=16)
    assert seen[2], "it was interrupted in the middle"
    assert not list(tmp_path.iterdir())


def test_a_half_made_folder_never_bears_the_name(tmp_path, monkeypatch):
    render, root = rooms.render_room, tmp_path / "r"

    def watched(*arguments):
        assert not root.exists()
        return render(*arguments)

    monkeypatch.setattr(rooms, "render_room", watched)
    assert rooms.render_rooms(root, train=1, val=1, height=12, width=16) == root


@pytest.mark.parametrize("theirs", [1, 2])
def test_a_process_that_finished_first_wins(tmp_path, monkeypatch, theirs):
    render, root, size = rooms.render_room, tmp_path / "r", {"val": 1, "height": 12, "width": 16}

    def raced(*arguments):
        monkeypatch.setattr(rooms, "render_room", render)
        rooms.render_rooms(root, train=theirs, **size)
        return render(*arguments)

    monkeypatch.setattr(rooms, "render_room", raced)
    if theirs == 1:
        assert rooms.render_rooms(root, train=1, **size) == root
    else:
        with pytest.raises(FileExistsError, match="train"):
            rooms.render_rooms(root, train=1, **size)
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    assert len(list((root / "train" / "image").iterdir())) == theirs


@pytest.mark.parametrize("wrong", [{"train": -1}, {"height": 1}, {"seed": -1}, {"dtype": np.int32}])
def test_impossible_arguments_are_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        rooms.render_rooms(tmp_path / "r", **{"train": 1, "val": 1, "height": 12, "width": 16, **wrong})
    assert not list(tmp_path.iterdir())


def test_the_command_a_user_types(tmp_path):
    command = "-m gradsurgery.recipes.rooms --root out/rooms --train 2 --val 1 --height 12 --width 16 --seed 7"
    done = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = rooms.render_rooms(tmp_path / "here", train=2, val=1, height=12, width=16, seed=7)
    typed = {path: content for path, (_, content) in files(tmp_path / "out" / "rooms").items()}
    assert typed == {path: content for path, (_, content) in files(here).items()}
    assert Path("train/normal/1.npy") in typed
