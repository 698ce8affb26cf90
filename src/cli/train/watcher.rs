//! A run as it is shown.

use crate::cli::args::{megabytes, print_json};
use crate::cli::{interrupt, print_error, progress};
use crate::error::Error;
use crate::train::{Observer, StepReport};
use indicatif::ProgressBar;
use serde_json::json;
use std::ops::ControlFlow;

/// Shows steps on a bar, or as JSON lines, and passes wishes to stop on.
pub(in crate::cli) struct Watcher {
    pub(in crate::cli) bar: ProgressBar,
    json: bool,
}

impl Watcher {
    pub(in crate::cli) fn new(total: u64, done: u64, json: bool) -> Self {
        let bar = progress::count(total, "train");
        bar.set_position(done);
        bar.reset_eta();
        Self { bar, json }
    }
}

impl Observer for Watcher {
    fn on_step(&mut self, r: &StepReport) -> ControlFlow<()> {
        let rate = r.tokens as f64 / r.time.as_secs_f64();
        let memory = crate::memory::anonymous_bytes().map_or_else(String::new, |b| format!(", {}", megabytes(b)));
        self.bar.set_position(r.step);
        self.bar.set_message(format!("loss {:.3}, {rate:.0} tok/s{memory}", r.loss));
        if self.json {
            let mut line = json!({
                "step": r.step, "loss": r.loss, "lr": r.lr, "grad_norm": r.grad_norm, "tok_s": rate,
            });
            for (name, loss) in
                [("eval_loss", r.eval_loss), ("general_loss", r.general_loss), ("held_loss", r.held_loss)]
            {
                if let Some(loss) = loss {
                    line[name] = loss.into();
                }
            }
            if let Some(known) = r.known {
                line["known"] = known.count().into();
            }
            if r.learns_little() {
                line["learns_little"] = true.into();
            }
            print_json(&line);
        }
        ControlFlow::Continue(())
    }

    fn keep_going(&mut self) -> bool {
        !interrupt::asked()
    }

    fn on_preparing(&mut self, done: usize, prompts: usize) {
        self.bar.set_message(match prompts - done {
            0 => String::new(),
            _ => format!("asks what it knows: {done} of {prompts}"),
        });
    }

    fn on_warning(&mut self, warning: &Error) {
        self.bar.suspend(|| print_error("warning", warning));
    }
}
