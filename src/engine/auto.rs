//! Settings that find themselves, on an engine: see [`train::auto`](crate::train::auto).

use super::Engine;
use super::reader::Reader;
use crate::adapter::{AdapterFile, Kind};
use crate::error::{Error, ErrorCode, Result};
use crate::eval::score_data;
use crate::train::auto::{Choice, Draft, LOOK, Probe, Rates, Survey, few, spoken, steps_within};
use crate::train::{
    Batches, Dataset, Keep, Material, Observer, Schedule, TrainConfig, general_start, keep_share, plain,
};
use std::path::Path;
use std::time::Instant;

/// Folder of the probe's trainer in the output folder.
const PROBE: &str = "probe";
/// Tokens of the data that are looked at for their language.
const LANGUAGE_TOKENS: usize = 400;
/// So many times what a character of plain English costs a model, in a language that it hardly knows.
const FOREIGN: f64 = 2.5;
/// Loss of a token below which nothing is left to learn.
const KNOWN: f64 = 0.05;
/// Share of what is left of a bound in time that the probe may take, and that looks may take of what is left then.
const FOR_PROBE: f64 = 1.0 / 3.0;
const FOR_LOOKS: f64 = 0.25;
/// Share of what is left of a bound in time that may go to the check and to what the model is held to.
const FOR_EXTRAS: f64 = 0.4;
/// Looks of a bounded run at most.
const LOOKS: u64 = 10;

impl Reader {
    /// Settings for a run on `data`, from its figures and the size of the model: all that nobody has `given`. The draft's
    /// settings are those for [`Reader::material`]; [`Engine::settle`] makes the choice of it.
    ///
    /// # Errors
    /// A setting is out of range; the data cannot be read again.
    pub fn draft(&self, config: TrainConfig, given: &dyn Fn(&str) -> bool, data: &Dataset) -> Result<Draft> {
        let survey = Survey::read(&data.path, config.seed)?;
        let tokenizer = &self.text().tokenizer;
        let (mut samples, mut chars, mut tokens) = (Vec::new(), 0, 0);
        for text in survey.texts() {
            let sample = plain(tokenizer, text)?;
            if tokens >= LANGUAGE_TOKENS {
                break;
            }
            if sample.ids.len() > 1 {
                (chars, tokens) = (chars + text.chars().count(), tokens + sample.ids.len());
                samples.push(sample);
            }
        }
        let own = (chars > 0).then(|| (Dataset::new(data.path.clone(), samples), chars));
        let language = own.map(|own| Ok::<_, Error>([own, general_start(tokenizer)?])).transpose()?;
        Draft::new(config, given, data, &survey, self.size(), language)
    }
}

/// What the check before and after a run, and the answers that the model is held to, cost beside the steps, in tokens of
/// training. Where that is too much of the `left` ones of a bound in time, what nobody asked for is left out, the check
/// first, and the choice says so.
fn extras(draft: &Draft, material: &Material, left: f64, config: &mut TrainConfig, choice: &mut Choice) -> f64 {
    // Answers are made a token at a time, which costs about as much as a step on it.
    let cost = |[read, answered]: [usize; 2]| LOOK * read as f64 + answered as f64;
    let (mut check, mut keep) = (2.0 * cost(material.check_tokens()), cost(material.keep_tokens()));
    let [own_check, own_keep] = draft.own_extras;
    let mut out = |what: &str, instead: &str| {
        choice.doubts.push(format!("the time is too short for {what}, so there is none; give more `--time`{instead}"));
    };
    if own_check && config.check && check + keep > FOR_EXTRAS * left {
        (config.check, check) = (false, 0.0);
        out("the check of general questions", ", or run `pocketlora eval --general` afterwards");
    }
    if own_keep && config.keep != Keep::Off && check + keep > FOR_EXTRAS * left {
        (config.keep, keep) = (Keep::Off, 0.0);
        out("holding the model to its answers on general prompts", ", or it may forget more than it would");
    }
    check + keep
}

impl Engine {
    /// Makes the choice: tries learning rates for a few steps each, unless one was given, and fits the run into the time
    /// up to `end`, if there is an end. `out` is the run's folder; nothing stays in it. Without an `end` the choice depends on the data, the
    /// model and the seed alone.
    ///
    /// # Errors
    /// Stopped by the observer; as [`Engine::trainer`].
    pub fn settle(
        &self,
        draft: Draft,
        material: &Material,
        init: Option<&AdapterFile>,
        out: &Path,
        end: Option<Instant>,
        observer: &mut dyn Observer,
    ) -> Result<(TrainConfig, Choice)> {
        let (mut config, mut choice) = (draft.config.clone(), Choice::default());
        choice.doubts = draft.doubts.clone();
        choice.doubts.extend(self.foreign(&draft)?);
        choice.watched = material.eval_data.as_ref().map_or(0, |data| data.samples.len());
        let mut token_seconds = None;
        if draft.open_rate || end.is_some() {
            let probe = self.probe(&draft, material, init, out, end, observer);
            let probe = match probe {
                Err(e) if e.code() == ErrorCode::Cancelled => {
                    return Err(Error::new(ErrorCode::Cancelled, "training", "stopped before the first step"));
                }
                other => other?,
            };
            config.lr = probe.lr;
            token_seconds = Some(probe.token_seconds);
            (choice.loss_before, choice.tried) = (probe.before, probe.tried);
            (choice.probe_tokens, choice.probe_seconds) = (probe.tokens, probe.seconds);
            if let Some(before) = probe.before.filter(|before| *before < KNOWN) {
                choice.doubts.push(format!(
                    "the model knows this data already (a loss of {before:.3} before the first step); there is next to \
                     nothing to learn"
                ));
                if draft.own_length {
                    config.epochs = 1;
                    config.eval_every = config.eval_every.min(1);
                }
            }
        }
        let left = end.map(|end| end.saturating_duration_since(Instant::now()).as_secs_f64());
        let left = match (left, token_seconds) {
            (Some(left), Some(each)) => {
                Some(left - extras(&draft, material, left / each, &mut config, &mut choice) * each)
            }
            (left, _) => left,
        };
        let in_epoch =
            Batches::new(&material.data, &TrainConfig { epochs: 1, steps: None, ..config.clone() })?.total_steps();
        choice.most_steps = Batches::new(&material.data, &config)?.total_steps();
        if let Some(each) = token_seconds {
            let held = keep_share(&config, init.is_some());
            let step = each * (1.0 + held) * material.data.tokens() as f64 / in_epoch as f64;
            let looked_at = material.eval_data.as_ref().map_or(0, Dataset::tokens) as f64;
            let look = each * LOOK * looked_at;
            let looks = choice.most_steps.checked_div(config.eval_every).unwrap_or(0) as f64;
            let looking = look * looks / choice.most_steps as f64;
            if let Some(left) = left {
                let fitting = steps_within(left, step + looking);
                if fitting < in_epoch && in_epoch <= choice.most_steps {
                    choice.doubts.push(format!(
                        "the time is too short for one pass over the data: {} steps of {in_epoch} fit into the {} that are \
                         left; give more `--time`, or less data",
                        fitting,
                        spoken(left)
                    ));
                }
                if fitting < choice.most_steps && draft.own_length {
                    (config.steps, config.epochs) = (Some(fitting), TrainConfig::default().epochs);
                    choice.most_steps = fitting;
                    // A float to an integer saturates.
                    let looks = ((FOR_LOOKS * left / look.max(1e-9)) as u64).clamp(1, LOOKS);
                    config.eval_every = config.eval_every.min(fitting.div_ceil(looks));
                }
            }
            choice.run_seconds = Some((step + looking) * choice.most_steps as f64);
        }
        choice.lines = draft.told(&config, &choice, end.is_some());
        Ok((config, choice))
    }

    /// A run of a few steps with each of the draft's rates, in a folder of its own that is gone afterwards; a run that is to
    /// end at some time is given a share of it.
    fn probe(
        &self,
        draft: &Draft,
        material: &Material,
        init: Option<&AdapterFile>,
        out: &Path,
        end: Option<Instant>,
        observer: &mut dyn Observer,
    ) -> Result<Probe> {
        let until = end.map(|end| {
            let now = Instant::now();
            now + end.saturating_duration_since(now).mul_f64(FOR_PROBE)
        });
        let rates = Rates { all: draft.rates(), usual: draft.config.lr, until };
        let usual = TrainConfig::default();
        let config = TrainConfig {
            lr: rates.all[0],
            schedule: Schedule::Constant,
            warmup: 0.0,
            steps: Some(Probe::STEPS as u64),
            epochs: usual.epochs,
            eval_data: None,
            eval_split: None,
            eval_reworded: false,
            eval_every: 0,
            max_forgetting: None,
            keep: Keep::Off,
            check: false,
            patience: 0,
            keep_best: false,
            // The first restart is far behind a probe's last step.
            relora: None,
            relora_prune: None,
            relora_warmup: None,
            relora_rank: None,
            ..draft.config.clone()
        };
        let samples = Probe::STEPS * config.batch * config.accumulate;
        let data = few(&material.data, samples, usize::MAX, config.seed);
        let mut some = Material::of(data);
        // What virtual tokens begin as is that of the run.
        some.prompt_ids = material.prompt_ids.clone().or_else(|| {
            let ids = || material.data.samples.iter().flat_map(|sample| sample.ids.iter().copied());
            (config.method == Kind::Cartridge).then(|| ids().take(config.adapter().num_virtual_tokens).collect())
        });
        let folder = out.join(PROBE);
        let found = self
            .trainer_of(config, some, init, &folder)
            .and_then(|mut trainer| trainer.probe(&rates, material.eval_data.as_ref(), observer));
        // What it leaves is of no use; where it cannot be taken away, the run goes on all the same.
        let _ = std::fs::remove_dir_all(&folder);
        found
    }

    /// What to say where the model hardly knows the language of the data.
    fn foreign(&self, draft: &Draft) -> Result<Option<String>> {
        let Some(both) = &draft.language else { return Ok(None) };
        let mut of_each = [0.0; 2];
        for (cost, (data, chars)) in of_each.iter_mut().zip(both) {
            *cost = score_data(self, data, &mut |_| true)?.nll_sum / *chars as f64;
        }
        let [own, general] = of_each;
        let text = format!(
            "the model hardly knows the language of this data: a character of it costs {own:.1} nats, one of plain English \
             {general:.1}; it can learn answers by heart, and will hardly understand other wordings: take a model that was \
             made for the language"
        );
        Ok((own > FOREIGN * general).then_some(text))
    }
}
