"""Which checkpoint of a run is written when."""

from dataclasses import asdict

from configurator import UserError

from runtime.checkpoint import save_checkpoint
from runtime.run_log import to_lines


class CheckpointSaver:
    """Keeps the best and the latest state of a run on the disk.

    ckpt.pt is nanoGPT's: the best by val loss, or with always_save_checkpoint that of the last
    evaluation. A newer state than that goes to ckpt_last.pt beside it, until ckpt.pt is the newest
    again. A save that fails costs nothing but itself: the run goes on, the old file stays, and the
    next evaluation tries again.
    """

    def __init__(self, state, tokenizer, config, folder, processes, log):
        self.state, self.tokenizer, self.config = state, tokenizer, config
        self.folder, self.processes, self.log = folder, processes, log
        self.saved_iter = state.iter_num  # of the newest state that is on the disk
        self.failure = ''  # why the last save failed

    def after_evaluation(self, val_loss):
        """Save what an evaluation with this val loss calls for. Returns what to say of it."""
        best_before = self.state.best_val_loss, self.state.best_iter
        is_best = val_loss < self.state.best_val_loss
        if is_best:
            self.state.best_val_loss, self.state.best_iter = val_loss, self.state.iter_num
        if not self.is_due():
            return ''
        if not is_best and not self.config.always_save_checkpoint:
            return self.save(self.folder.latest)
        saved = self.save(self.folder.checkpoint)
        if not saved:
            # those of the best that is on the disk
            self.state.best_val_loss, self.state.best_iter = best_before
        elif self.folder.writes:
            self.folder.latest.unlink(missing_ok=True)  # it is older now
        return saved

    def is_out_of_patience(self):
        """Whether the val loss has not become better for too many evaluations. Says so."""
        state, config = self.state, self.config
        n_since = (state.iter_num - state.best_iter) // config.eval_interval
        if not config.patience or n_since < config.patience:
            return False
        self.log.say(f'stopped: no better val loss in patience={config.patience} evaluations than '
                     f'the {state.best_val_loss:.4f} of iteration {state.best_iter}')
        return True

    def at_stop(self):
        """Save the state that a signal stops at, if it is not on the disk. Returns what to say."""
        if self.state.iter_num <= self.saved_iter or self.config.eval_only:
            return ''
        return self.save(self.folder.latest)

    def check_saved(self):
        """Raise UserError if the end of the run is not on the disk."""
        if self.failure:
            newest = 'nothing of it is saved'
            if self.saved_iter:
                newest = f'its newest checkpoint at {self.saved_iter}'
            raise UserError(f'the run is at iteration {self.state.iter_num} and {newest}, since '
                            f'{self.failure}: make room and start it again, with --init_from=auto')

    def is_due(self):
        """Whether there is something to save: a state that ckpt.pt does not hold already."""
        if self.config.eval_only:
            return False
        has_it = self.state.resumed_from == self.folder.checkpoint
        return self.state.iter_num > (self.saved_iter if has_it else 0)

    def save(self, path):
        """Write the state to path. Returns what to say of it, '' if that failed in any process.
        All processes have to call it."""
        state, processes = self.state, self.processes
        weights, optimizer = processes.full_state(state.model, state.optimizer)
        if self.folder.writes:
            self.failure = ''
            try:
                save_checkpoint(
                    path, state.model, self.tokenizer, asdict(self.config), state.iter_num, weights,
                    self.config.keep_checkpoints, best_val_loss=state.best_val_loss,
                    best_iter=state.best_iter, wandb_id=state.wandb_id,
                    optimizer=optimizer, scaler=state.scaler.state_dict(),
                    processes=processes.size, metrics=to_lines(state.metrics))
            except OSError as e:
                self.failure = str(e)
                self.log.warn(f'{e}; training goes on')
        if processes.any(bool(self.failure)):
            return ''
        self.saved_iter = state.iter_num
        return f' | saved {path}'
