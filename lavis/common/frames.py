"""Which frames of a video are shown."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lavis.common.errors import ConfigError
from lavis.common.typed import Checked, ranged


@dataclass(frozen=True)
class VideoConfig(Checked):
    """``preprocess.video``: a frame is shown as an image is, and takes as many tokens.

    Attributes:
        max_frames: most frames of a video.
        fps: frames a second. Without, ``max_frames`` evenly spaced ones, as the original has it.
        max_tokens: of the frames of a video together.
    """

    max_frames: int = ranged(32, least=1)
    fps: float | None = None
    max_tokens: int | None = ranged(None, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ConfigError(f"fps must be positive, not {self.fps}")

    def within(self, tokens: int) -> VideoConfig:
        """The same with ``max_tokens`` met by fewer frames, of so many tokens each.

        Raises:
            ConfigError: not even one fits.
        """
        if self.max_tokens is None:
            return self
        if self.max_tokens < tokens:
            raise ConfigError(
                f"preprocess.video.max_tokens is {self.max_tokens}, but one frame takes {tokens} "
                "tokens; raise it, or take a connector that gives an image fewer"
            )
        return replace(self, max_frames=min(self.max_frames, self.max_tokens // tokens))

    def choose(self, frames: int, rate: float) -> list[int]:
        """Numbers of the frames that are shown.

        Args:
            frames: of the video.
            rate: of these, a second.
        """
        if self.fps is None:
            step = max(frames // self.max_frames, 1)
            return list(range(0, frames, step))[: self.max_frames]
        each = max(rate / self.fps, 1.0)
        shown = [int(k * each + 1e-6) for k in range(math.ceil(frames / each - 1e-6))]
        if len(shown) <= self.max_frames:
            return shown
        return [k * frames // self.max_frames for k in range(self.max_frames)]
