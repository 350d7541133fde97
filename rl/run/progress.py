"""The progress of a run: a bar on a terminal, a few plain lines elsewhere."""

import sys
import time
from datetime import timedelta

from tqdm import tqdm

from rl.args import CommonArgs

PLAIN_LINES = 20  # about so many in a whole run


class Progress:
    """Shows steps, updates, mean return, steps per second and time left.

    Args:
        args: of the run.
        steps: environment steps of an update.
        enabled: False on the ranks that say nothing.
        updates_done: before, in a run that is resumed.
    """

    def __init__(self, args: CommonArgs, steps: int, enabled: bool, updates_done: int = 0) -> None:
        self.num_updates, self.steps = args.num_updates, steps
        self.updates_done = updates_done
        self.plain = enabled and not sys.stderr.isatty()
        self.start = time.perf_counter()
        self.bar = tqdm(
            total=args.num_updates * steps,
            initial=updates_done * steps,
            unit=" steps",
            disable=not enabled or self.plain,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )

    def show(self, update: int, scalars: dict[str, float], best_return: float | None = None) -> None:
        """Show the state of the run after `update` updates: scalars that were logged, the best evaluation if any."""
        num_updates, num_steps = self.num_updates, self.steps
        mean_return = f"{scalars['Rewards/rew_avg']:.1f}" if "Rewards/rew_avg" in scalars else "none yet"
        if best_return is not None:
            mean_return += f", best {best_return:.1f}"
        self.bar.set_postfix_str(f"update {update}/{num_updates}, return {mean_return}", refresh=False)
        self.bar.update(num_steps)
        if self.plain and (update == num_updates or update % max(1, num_updates // PLAIN_LINES) == 0):
            seconds = time.perf_counter() - self.start
            seconds_per_update = seconds / (update - self.updates_done)
            left = timedelta(seconds=round(seconds_per_update * (num_updates - update)))
            print(
                f"steps {update * num_steps}/{num_updates * num_steps}, update {update}/{num_updates}, "
                f"return {mean_return}, {num_steps / seconds_per_update:.0f} steps/s, {left} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        self.bar.close()
