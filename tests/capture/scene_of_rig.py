"""What stands in front of the virtual DSLR, without importing libgphoto2 into the test's own process."""

from __future__ import annotations

from capture.scenes import Scene, procedural_scene

SCENE_SIZE = (120, 160)


def scene() -> Scene:
    """A drawn scene between 0.6 and 4 m, textured everywhere."""
    return procedural_scene(5, *SCENE_SIZE, near_m=0.6, far_m=4.0, low_texture=0.0)
