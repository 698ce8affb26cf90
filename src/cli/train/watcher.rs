//! A run as it is shown.

use crate::cli::args::{megabytes, print_json};
use crate::cli::{interrupt, print_error, progress};
use crate::error::Error;
use crate::train::{Check, Observer, StepReport};
use indicatif::ProgressBar;
use serde_json::json;
use std::ops::ControlFlow;

/// Shows steps on a bar, or as JSON lines, and passes wishes to stop on.
pub(in crate::cli) struct Watcher {
    pub(in crate::cli) bar: ProgressBar,
    json: bool,
    label: &'static str,
    /// Something else than steps is shown.
    paused: bool,
}

/// Labels of the bar: a run, the probe before it, and what is done between steps.
const TRAIN: &str = "train";
const CHOOSE: &str = "choose";
const ASK: &str = "ask";
const BEGIN: &str = "begin";
const CHECK: &str = "check";

impl Watcher {
    pub(in crate::cli) fn new(total: u64, done: u64, json: bool) -> Self {
        let bar = progress::count(total, TRAIN);
        bar.set_position(done);
        bar.reset_eta();
        Self { bar, json, label: TRAIN, paused: false }
    }

    /// Watches a probe of `total` steps, which chooses a learning rate.
    pub(super) fn choosing(total: u64) -> Self {
        Self { bar: progress::count(total, CHOOSE), json: false, label: CHOOSE, paused: false }
    }

    fn pause(&mut self, label: &str, message: String) {
        if !std::mem::replace(&mut self.paused, true) {
            progress::pause(&self.bar, label);
        }
        self.bar.set_prefix(label.to_owned());
        self.bar.set_message(message);
    }

    fn resume(&mut self) {
        if std::mem::take(&mut self.paused) {
            progress::resume(&self.bar, self.label);
        }
    }
}

impl Observer for Watcher {
    fn on_step(&mut self, r: &StepReport) -> ControlFlow<()> {
        let rate = r.tokens as f64 / r.time.as_secs_f64();
        let memory = crate::memory::anonymous_bytes().map_or_else(String::new, |b| format!(", {}", megabytes(b)));
        self.resume();
        // A probe begins again with each rate.
        match self.label {
            CHOOSE => self.bar.inc(1),
            _ => self.bar.set_position(r.step),
        }
        let what = if self.label == CHOOSE { "the learning rate: " } else { "" };
        self.bar.set_message(format!("{what}loss {:.3}, {rate:.0} tok/s{memory}", r.loss));
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

    fn on_beginning(&mut self, done: usize, all: usize) {
        if done == all && all > 0 {
            self.resume();
            self.bar.set_message("");
        } else {
            self.pause(BEGIN, format!("how the adapter begins: {done} of {all}"));
        }
    }

    fn on_preparing(&mut self, done: usize, prompts: usize) {
        match prompts - done {
            0 => {
                self.resume();
                self.bar.set_message("");
            }
            _ => self.pause(ASK, format!("what it knows: {done} of {prompts}")),
        }
    }

    fn on_checking(&mut self, what: Check, done: usize, all: usize) {
        let of = if done > 0 { format!(": {done} of {all}") } else { String::new() };
        self.pause(CHECK, format!("{what}{of}"));
    }

    fn on_warning(&mut self, warning: &Error) {
        self.bar.suspend(|| print_error("warning", warning));
    }
}
