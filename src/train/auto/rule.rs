//! What follows for a run from the size of the model and of the data.

use super::Choice;
use super::survey::Survey;
use super::time::spoken;
use crate::adapter::Kind;
use crate::train::{Dataset, TrainConfig};
use pocketlora_models::{Model, Role};
use std::fmt::Write as _;

/// Size of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    /// Width of its layers.
    pub hidden: usize,
    /// Values of its linear layers.
    pub values: usize,
}

impl Size {
    pub fn of(model: &dyn Model) -> Self {
        let linears = model.params().iter().filter(|p| p.role == Role::Linear);
        let values = linears.map(|p| p.shape.iter().product::<usize>()).sum();
        Self { hidden: model.config().hidden_size, values }
    }
}

/// Figures that the rule goes by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Numbers {
    samples: usize,
    tokens: usize,
    trained: usize,
    /// Whether questions are answered; otherwise there are texts.
    asks: bool,
    /// Whether something can tell that the run gets no better.
    can_watch: bool,
    pub size: Size,
}

/// Factors on the usual rate that the probe tries, rising.
const FACTORS: [f32; 3] = [0.5, 1.0, 2.0];
/// Samples that a run comes by, however few there are.
const PASSED: usize = 1000;
/// Passes over the data at most, and steps at least.
const EPOCHS: usize = 12;
const STEPS: usize = 24;
/// Passes over answers from which on their questions are thinned, and by how much: what is seen often is learned by its
/// letters otherwise. Measured on SmolLM2-135M and 16 facts in three wordings, see README.
const OFTEN: usize = 4;
const THINNED: f32 = 0.3;
/// Looks at how it does.
const LOOKS: u64 = 10;
/// Tokens of a pass that keep two cores as busy as more would.
const PASS_TOKENS: usize = 1024;

impl Numbers {
    pub fn new(data: &Dataset, survey: &Survey, size: Size) -> Self {
        Self {
            samples: data.samples.len().max(1),
            tokens: data.tokens(),
            trained: data.trained_tokens(),
            asks: survey.asks(),
            can_watch: survey.can_watch(),
            size,
        }
    }

    fn length(&self) -> usize {
        self.tokens.div_ceil(self.samples).max(1)
    }
}

/// The learning rate that an adapter of `method` usually learns well with on a model whose layers are `hidden` wide.
///
/// For LoRA that of Schulman et al. ("LoRA Without Regret", 2025), ten times what a full fine-tuning takes, falling with
/// the width: 1.3e-3 at 576, 9e-4 at 896, 2e-4 at 4096 and above. IA3 scales what is there, and its scales begin at 1; a
/// prefix has values as keys have them. Both need steps of a hundredth, and so do VeRA's scales. What turns the whole input
/// or adds to the weight itself takes a thousandth; MiSS's rows, which many inputs share, less.
#[must_use]
pub fn usual_rate(method: Kind, hidden: usize) -> f32 {
    let rate = match method {
        Kind::Miss => 2e-4,
        // A step sets B's direction, whatever its size, once B is longer than 1e-4: larger rates give it its whole strength at once.
        // On SmolLM2-135M and the demo's data the loss is 13 to 18 at 1e-3, 11 falling to 3.2 at 1e-6, and 1.3 after 8 steps at this one.
        Kind::Delora => 1e-7,
        Kind::Bottleneck
        | Kind::Oft
        | Kind::Boft
        | Kind::Deft
        | Kind::Hra
        | Kind::Shira
        | Kind::Supertuning
        | Kind::Loha
        | Kind::Lokr => 1e-3,
        // AdaLoRA's three factors all begin small.
        Kind::Road | Kind::Beft | Kind::Adalora => 5e-3,
        Kind::Lora
        | Kind::Dora
        | Kind::LoraFa
        | Kind::Bdlora
        | Kind::Gralora
        | Kind::Dylora
        | Kind::Sora
        | Kind::Melora
        | Kind::Hydra
        | Kind::DeltaLora => (5e-4 * (2000.0 / hidden.max(1) as f64).powf(0.775)).clamp(2e-4, 2e-3),
        // Rows of an embedding are small, and so are the layers of P-tuning's network.
        Kind::TrainableTokens | Kind::PTuning => 3e-3,
        _ => 1e-2,
    };
    rounded(rate)
}

/// The share of a question's words to leave out where answers are seen in so many `epochs`.
#[must_use]
pub fn usual_prompt_dropout(epochs: usize) -> f32 {
    if epochs >= OFTEN { THINNED } else { 0.0 }
}

/// Two digits, as people write rates.
fn rounded(rate: f64) -> f32 {
    format!("{rate:.1e}").parse().expect("a number that was just written")
}

/// The rates that the probe tries, rising.
pub(super) fn rates(method: Kind, size: Size) -> Vec<f32> {
    let usual = usual_rate(method, size.hidden);
    FACTORS.iter().map(|factor| rounded(f64::from(usual * factor))).collect()
}

/// A rank whose values can hold what is to be learned: some bits a token, and a bit or two a value. Above, a rank costs
/// time and keeps what it need not; below, few directions are learned slowly.
fn rank(n: &Numbers) -> usize {
    let least: usize = if n.size.values < 1_000_000_000 { 16 } else { 8 };
    // All layers adapted, a rank adds about a value for every third of the square root of a layer's.
    let of_one = (n.size.values as f64 / n.size.hidden.max(1) as f64 * 1.5) as usize;
    (8 * n.trained / of_one.max(1)).next_power_of_two().clamp(least, 64)
}

/// Samples of a step: as many as fill a pass, but so few that an epoch has several steps.
fn batch(n: &Numbers) -> usize {
    let filling = (PASS_TOKENS / n.length()).clamp(1, 8);
    filling.min(n.samples.div_ceil(4)).max(1)
}

/// `config` with all that nobody has `given`.
pub(super) fn settings(mut config: TrainConfig, given: &dyn Fn(&str) -> bool, n: &Numbers) -> TrainConfig {
    let open = |key: &str| !given(key);
    if open("lr") {
        config.lr = usual_rate(config.method, n.size.hidden);
    }
    if open("rank") && config.method.reads("rank") {
        config.rank = match config.method {
            // Its scales are few, whatever the rank.
            Kind::Vera => 256,
            // It works with the square of it.
            Kind::Loha => rank(n).min(16),
            _ => rank(n),
        };
    }
    if open("batch") && open("accumulate") && !config.packing {
        config.batch = batch(n);
    }
    if given("epochs") || given("steps") {
        return config;
    }
    let in_epoch = n.samples.div_ceil(config.batch).div_ceil(config.accumulate);
    config.epochs = (PASSED / n.samples).clamp(1, EPOCHS).max(STEPS.div_ceil(in_epoch).min(STEPS));
    if open("prompt-dropout") && n.asks {
        config.prompt_dropout = usual_prompt_dropout(config.epochs);
    }
    let own = config.eval_data.is_none() && config.eval_split.is_none();
    config.eval_reworded = own && n.can_watch;
    if config.eval_reworded || !own {
        if open("eval-every") {
            config.eval_every = ((config.epochs * in_epoch) as u64).div_ceil(LOOKS).max(1);
        }
        if open("patience") {
            config.patience = 2;
        }
    }
    config
}

/// The choice in two lines: what was chosen and what for; how long it takes and what ends it.
pub(super) fn told(n: &Numbers, config: &TrainConfig, choice: &Choice, open_rate: bool, bounded: bool) -> [String; 2] {
    let mut first = format!("auto: lr {:e}", config.lr);
    match choice.tried.len() {
        0 | 1 => {}
        _ if open_rate => {
            let _ = write!(first, " of {} tried", choice.tried.len());
        }
        _ => {}
    }
    if config.method.reads("rank") {
        let _ = write!(first, ", rank {}", config.rank);
    }
    if config.prompt_dropout > 0.0 {
        let _ = write!(first, ", prompt dropout {}", config.prompt_dropout);
    }
    let schedule = format!("{:?}", config.schedule).to_lowercase();
    let kind = if n.asks { "answers" } else { "texts" };
    let _ = write!(
        first,
        ", batch {}, {schedule}; for {} {kind} with {} tokens to learn",
        config.batch * config.accumulate,
        n.samples,
        n.trained
    );
    let mut second = format!("auto: at most {} steps", choice.most_steps);
    if config.steps.is_none() {
        let _ = write!(second, " ({} epochs)", config.epochs);
    }
    if let Some(seconds) = choice.run_seconds {
        let _ = write!(second, ", about {}", spoken(seconds));
        if bounded {
            second.push_str(", which `--time` bounds");
        }
    }
    let what = match (config.eval_reworded, n.asks) {
        // Before the data is read anew it is not known how many.
        (true, _) if choice.watched == 0 => "what is watched".to_owned(),
        (true, true) => format!("{} answers to other wordings", choice.watched),
        (true, false) => format!("{} texts that are left out", choice.watched),
        _ => "what is held out".to_owned(),
    };
    if config.patience > 0 && config.eval_every > 0 {
        let _ = write!(second, "; ends sooner where {what} get no likelier");
    }
    [first, second]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(samples: usize, length: usize) -> Numbers {
        let (tokens, trained) = (samples * length, samples * length / 3);
        let size = Size { hidden: 576, values: 106_000_000 };
        Numbers { samples, tokens, trained, asks: true, can_watch: true, size }
    }

    fn chosen(samples: usize, length: usize, given: &[&str]) -> TrainConfig {
        settings(TrainConfig::default(), &|key| given.contains(&key), &numbers(samples, length))
    }

    #[test]
    fn the_rate_falls_with_the_width_and_depends_on_the_method() {
        let rates = [64, 576, 896, 2048, 4096, 16384].map(|hidden| usual_rate(Kind::Lora, hidden));
        assert_eq!(rates, [2e-3, 1.3e-3, 9.3e-4, 4.9e-4, 2.9e-4, 2e-4]);
        assert_eq!(usual_rate(Kind::Ia3, 576), usual_rate(Kind::Ia3, 4096));
    }

    #[test]
    fn little_data_is_seen_often_and_much_data_once() {
        for (samples, batch, epochs) in [(1, 1, 24), (6, 2, 12), (40, 8, 12), (150, 8, 6), (10_000, 8, 1)] {
            let config = chosen(samples, 35, &[]);
            assert_eq!((config.batch, config.epochs), (batch, epochs), "{samples}");
            config.validate().unwrap();
            let steps = samples.div_ceil(batch) * epochs;
            assert!(steps >= 18 && config.eval_every as usize >= steps / 10, "{samples}: {steps}");
        }
        assert_eq!([chosen(40, 500, &[]).batch, chosen(40, 5000, &[]).batch], [2, 1]);
        let much = TrainConfig { rank: 0, ..chosen(20_000, 900, &[]) };
        assert_eq!((much.epochs, chosen(20_000, 900, &[]).rank > 16), (1, true));
    }

    #[test]
    fn what_is_given_stays_and_a_given_length_is_run_to_its_end() {
        let usual = TrainConfig::default();
        let keys = ["lr", "rank", "batch", "epochs"];
        assert_eq!(chosen(72, 35, &keys), usual);
        let config = chosen(72, 35, &["steps"]);
        assert_eq!((config.eval_every, config.eval_reworded, config.epochs), (0, false, usual.epochs));
        let held = TrainConfig { eval_split: Some(0.1), ..usual };
        let config = settings(held, &|key| key == "patience" || key == "eval-split", &numbers(72, 35));
        assert_eq!((config.eval_reworded, config.patience, config.eval_every > 0), (false, 0, true));
    }
}
