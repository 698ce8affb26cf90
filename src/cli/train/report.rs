//! What is said of a run before and after it.

use super::{Args, Run};
use crate::cli::args::{megabytes, print_json};
use crate::cli::out;
use crate::cli::shell::quoted_value;
use crate::engine::{Engine, Trainer};
use crate::train::{Keep, KeepReport, MemoryPlan, Summary};
use serde_json::{Value, json};

/// What a run will hold, and what was given up for a budget.
pub(in crate::cli) fn plan_text(plan: &MemoryPlan) -> String {
    let layout = &plan.layout;
    let mut text = format!(
        "memory: {} mapped (weights and their scales); {} anonymous: {} held before, {} for the run\n  before: program and \
         base {}, data {}, tokenizer {}{}\n  adapter {}, gradients {}, optimizer {}, references {}, layer \
         inputs {}, one layer {}, attention {}, logits {}, checkpoint {}, kernels {}\n  {} tokens in a pass, {}",
        megabytes(plan.weights_mapped),
        megabytes(plan.process()),
        megabytes(plan.before),
        megabytes(plan.anonymous()),
        megabytes(plan.before.saturating_sub(plan.data + plan.tokenizer)),
        megabytes(plan.data),
        megabytes(plan.tokenizer),
        match plan.tokenizer_loaded.saturating_sub(plan.tokenizer) {
            0 => String::new(),
            gone => format!(" (let go; {} while data was read)", megabytes(gone)),
        },
        megabytes(plan.adapter),
        megabytes(plan.gradients),
        megabytes(plan.optimizer),
        megabytes(plan.references),
        megabytes(plan.layer_inputs),
        megabytes(plan.layer_workspace),
        megabytes(plan.attention),
        megabytes(plan.logits),
        megabytes(plan.saving),
        megabytes(plan.kernels),
        plan.pass_tokens,
        match layout.every {
            1 => "every layer's input kept".to_owned(),
            n => format!("every {n} layers an input kept"),
        },
    );
    if layout.narrow {
        text.push_str(" in 16 bits");
    }
    if layout.part != usize::MAX {
        text.push_str(&format!(", feed-forward by {} tokens", layout.part));
    }
    if layout.loss_rows != usize::MAX {
        text.push_str(&format!(", loss by {} tokens", layout.loss_rows));
    }
    if plan.beginning > 0 {
        text.push_str(&format!(", {} before the first step for the adapter's beginning", megabytes(plan.beginning)));
    }
    text.push_str(&format!(", moments of {}", json!(plan.optimizer_kind).as_str().unwrap_or_default()));
    text
}

/// How a run is held to what the model knew, and whether questions show it.
pub(super) fn keep_text(trainer: &Trainer, keep: Keep, check: bool) -> String {
    let mut text = String::new();
    if let Some(KeepReport { prompts, taught, left_out, per_step, weight }) = trainer.keep_report() {
        let before = if taught > 0 { format!(" and {taught} questions that it was taught") } else { String::new() };
        let long = if left_out > 0 { format!(" ({left_out} more are too long here)") } else { String::new() };
        text += &format!(
            "keeps what it knew: held on {prompts} general prompts{before}{long}, {per_step:.2} a step, with weight {weight}\n"
        );
    } else if keep != Keep::Off {
        text += "not held to what it knew: no general prompt has room, or the adapter brings an embedding of its own\n";
    }
    if check && trainer.questions() == 0 {
        text += "asks no general questions: the model has no chat template, or no room for them\n";
    }
    text
}

/// What became of what the model knew.
pub(in crate::cli) fn known_text(s: &Summary) -> Option<String> {
    let before = s.before?.known?;
    let after = if s.done { s.of_adapter().known } else { s.known }?;
    let (still, all) = (after.still(before).count(), after.count());
    let more = if all > still { format!(", and {} that it did not", all - still) } else { String::new() };
    Some(format!("general questions: knew {} of {}, still knows {still}{more}", before.count(), s.asked))
}

/// Share of what the model knew, in percent, above which its loss is warned about.
const MUCH: f64 = 20.0;

/// What to say where much of what the model knew is gone.
fn forgetting_warning(s: &Summary) -> Option<String> {
    let lost = s.forgotten_percent().filter(|lost| *lost > MUCH)?;
    Some(format!(
        "the adapter makes the model forget: {lost:.0} % of the general questions that it knew are answered wrongly now; \
         try a lower `--lr`, fewer `--epochs`, a larger `--keep` (such as 2), or `--max-forgetting 10%`"
    ))
}

/// What of the check at the end was stopped.
fn unmeasured_text(s: &Summary, asked: bool) -> Option<String> {
    let mut missing = s.unmeasured();
    if s.done && !asked {
        missing.push("what was learned");
    }
    (!missing.is_empty()).then(|| format!("the check after training was stopped; not measured: {}", missing.join(", ")))
}

/// The same as JSON.
pub(in crate::cli) fn known_json(s: &Summary) -> Value {
    let (before, after) = (s.before.and_then(|b| b.known), if s.done { s.of_adapter().known } else { s.known });
    let (Some(before), Some(after)) = (before, after) else { return Value::Null };
    json!({"asked": s.asked, "before": before.count(), "still": after.still(before).count(), "after": after.count()})
}

/// What a run came to.
pub(super) fn report(run: &Run, baseline: Option<u64>, engine: &Engine, args: &Args) {
    let Run { summary: s, plan, data, choice, ranks, learned, asked } = run;
    // A run that was stopped before its first step has neither a loss nor a speed.
    let rate = (s.tokens > 0).then(|| s.tokens as f64 / s.time.as_secs_f64());
    if args.json {
        print_json(&json!({
            "done": s.done, "steps": s.steps, "adapter_step": s.adapter_step, "out_of_patience": s.out_of_patience,
            "loss": finite(s.loss), "eval_loss": s.eval_loss, "eval_loss_before": s.before.and_then(|b| b.held_out),
            "general_loss": s.general_loss, "general_loss_before": s.before.and_then(|b| b.general),
            "eval_overlap": s.eval_overlap, "general_questions": known_json(s),
            "adapter_eval_loss": s.of_adapter().held_out, "adapter_general_loss": s.of_adapter().general, "tok_s": rate,
            "tokens": s.tokens, "trained_tokens": s.trained_tokens, "padded_tokens": data.batches.padded_tokens,
            "seconds": s.time.as_secs_f64(), "peak_anonymous_bytes": s.peak_anonymous_bytes,
            "mapped_bytes": engine.mapped_bytes(), "plan": plan, "planned_bytes": plan.anonymous(),
            "baseline_anonymous_bytes": baseline,
            "deviation_percent": s.peak_anonymous_bytes.map(|peak| plan.deviation(peak)),
            "data": data, "adapter": s.adapter, "auto": choice, "ranks": ranks, "learned": learned, "out_of_time": s.out_of_time,
        }));
    } else {
        println!(
            "{} after {} steps: {}{} anonymous at most, {} mapped",
            if s.done { "done" } else { "stopped" },
            s.steps,
            rate.map_or(String::new(), |rate| format!("loss {:.3}; {rate:.0} tok/s, ", s.loss)),
            s.peak_anonymous_bytes.map_or_else(|| "unknown".to_owned(), megabytes),
            megabytes(engine.mapped_bytes())
        );
        let before = s.before.unwrap_or_default();
        for (name, before, after) in
            [("held-out data", before.held_out, s.eval_loss), ("general text", before.general, s.general_loss)]
        {
            if let (Some(before), Some(after)) = (before, after) {
                let learned = s.eval_overlap.filter(|o| o.learned > 0 && name.starts_with("held"));
                let learned = learned.map_or(String::new(), |o| {
                    format!("; {} of its {} records are learned, too", o.learned, o.records)
                });
                println!("loss on the {name}: {before:.3} before, {after:.3} after ({:+.3}){learned}", after - before);
            }
        }
    }
    if let Some(text) = known_text(s).filter(|_| !args.json) {
        println!("{text}");
    }
    forgetting_warning(s).into_iter().for_each(|warning| eprintln!("warning: {warning}"));
    unmeasured_text(s, *asked).into_iter().for_each(|text| eprintln!("{text}"));
    if s.out_of_patience {
        let what = if choice.is_some() { "what was watched got no likelier" } else { "the held-out loss fell no more" };
        eprintln!("ended early: {what}");
    }
    if s.out_of_time {
        eprintln!("ended early: the time was over");
        let steps = data.batches.steps as u64;
        // A run that was planned to be shorter has been warned about.
        if s.steps < steps && steps <= data.total_steps {
            eprintln!(
                "warning: the time was too short for one pass over the data: {} steps of {steps} were done; give more \
                 `--time`, or less data",
                s.steps
            );
        }
    }
    if let Some(learned) = learned {
        // What a program reads is JSON alone.
        if !args.json {
            println!("{}", learned.text());
        }
        learned.warning().into_iter().for_each(|warning| eprintln!("warning: {warning}"));
    }
    if s.done && s.adapter_step == 0 {
        eprintln!("warning: the adapter is the one that training began with: all later ones forgot more than allowed");
    } else if s.done && s.adapter_step != s.steps {
        let found = s.of_adapter();
        let losses = [("held-out data", found.held_out), ("general text", found.general)];
        let losses = losses.into_iter().filter_map(|(name, loss)| Some(format!("; loss on the {name} {:.3}", loss?)));
        let losses: String = losses.collect();
        eprintln!("the adapter is that of step {}, which did best by what was asked for{losses}", s.adapter_step);
    }
    if s.done {
        // An adapter belongs to the weights that it was trained on.
        let as_trained = if args.no_quantize { " --no-quantize" } else { "" };
        eprintln!(
            "use it: pocketlora chat -m {}{as_trained} -a {}",
            quoted_value(&args.model),
            quoted_value(&s.adapter)
        );
    } else {
        if out::failed() {
            eprintln!("stopped, for stdout takes nothing any more");
        }
        let instead = if args.overwrite { " instead of --overwrite" } else { "" };
        eprintln!("continue it: the same command with --resume{instead}");
    }
}

/// JSON has no NaN; a run that was stopped before its first step has no loss.
fn finite(value: f64) -> Value {
    if value.is_finite() { value.into() } else { Value::Null }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{Evaluation, Known};
    use std::time::Duration;

    fn known(bits: u64) -> Known {
        serde_json::from_value(bits.into()).unwrap()
    }

    /// A run that knew five questions and then those of `after`.
    fn run(after: Option<u64>) -> Summary {
        let before = Evaluation { held_out: Some(2.5), general: Some(3.0), known: Some(known(0b1_1111)) };
        Summary {
            done: true,
            steps: 4,
            adapter_step: 4,
            out_of_patience: false,
            out_of_time: false,
            loss: 1.0,
            tokens: 10,
            trained_tokens: 10,
            time: Duration::from_secs(1),
            peak_anonymous_bytes: None,
            before: Some(before),
            eval_loss: Some(2.0),
            general_loss: after.map(|_| 3.1),
            known: after.map(known),
            asked: 40,
            eval_overlap: None,
            kept: None,
            adapter: "out".into(),
        }
    }

    #[test]
    fn heavy_forgetting_is_warned_about() {
        for (after, warned) in
            [(Some(0b0_1111), false), (Some(0b0_0111), true), (Some(0b111_0000_0111), true), (None, false)]
        {
            let warning = forgetting_warning(&run(after)).unwrap_or_default();
            assert_eq!(
                warning.contains("40 %") && warning.contains("--max-forgetting"),
                warned,
                "{after:?}: {warning}"
            );
        }
    }

    #[test]
    fn what_was_not_measured_is_named_and_has_no_figures() {
        let whole = run(Some(0b1_1111));
        assert_eq!((unmeasured_text(&whole, true), known_json(&whole)["still"].as_u64()), (None, Some(5)));
        let stopped = run(None);
        let text = unmeasured_text(&stopped, false).unwrap();
        assert!(text.ends_with("loss on the general text, general questions, what was learned"), "{text}");
        assert_eq!((known_text(&stopped), known_json(&stopped)), (None, Value::Null));
        // A run that goes on later has its check before it.
        assert_eq!(unmeasured_text(&Summary { done: false, ..stopped }, true), None);
    }
}
