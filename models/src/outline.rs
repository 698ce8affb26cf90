//! What a model consists of, and how a family declares it.

use crate::config::Config;
use crate::op::{Conv, Linear, Norm, Param, RopeTable, StateId, StateSpec};
use crate::params::{Layout, ParamSpec, Role, Stack};
use crate::rope::Rope;

/// What a family declares of a model, for those who run it.
pub struct Outline {
    /// Sizes and constants.
    pub config: Config,
    /// All parameters; a [`Param`] is an index into this list.
    pub params: Vec<ParamSpec>,
    /// Rotary tables in use; a [`RopeTable`] is an index into this list.
    pub ropes: Vec<Rope>,
    /// What layers remember of earlier tokens; a [`StateId`] is an index into this list.
    pub states: Vec<StateSpec>,
    /// The embedding `[V, C]`.
    pub embedding: Param,
    /// Tensors that files may have, and that nothing reads.
    pub ignored: Vec<String>,
    /// The last norm.
    pub norm: Norm,
    /// The last product, with a weight `[V, C]`; the embedding's where they are tied.
    pub head: Linear,
}

/// The layers whose activations PEFT's IA3 (0.21) scales in a family where nobody names others: ends of their paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scaled {
    /// What these give is scaled.
    pub outputs: &'static [&'static str],
    /// What these read is scaled.
    pub inputs: &'static [&'static str],
}

impl Scaled {
    /// The keys and values of attention, and what the second feed-forward layer reads.
    pub(crate) const KEYS: Option<Self> = Some(Self { outputs: &["k_proj", "v_proj"], inputs: &["down_proj"] });
    /// The queries and values of attention, and what the second feed-forward layer reads.
    pub(crate) const QUERIES: Option<Self> = Some(Self { outputs: &["q_proj", "v_proj"], inputs: &["down_proj"] });
}

/// Collects what a family declares, in the order of its calls.
pub(crate) struct Builder {
    pub(crate) config: Config,
    params: Vec<ParamSpec>,
    ropes: Vec<Rope>,
    states: Vec<StateSpec>,
    embedding: Param,
    ignored: Vec<String>,
}

impl Builder {
    /// Begins with the embedding.
    pub(crate) fn new(config: Config) -> Self {
        Self::with_embedding(config, "model.embed_tokens")
    }

    /// The same where the embedding is the module `module`.
    pub(crate) fn with_embedding(config: Config, module: &str) -> Self {
        let shape = vec![config.vocab_size, config.hidden_size];
        let (params, ropes, states, ignored) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut new = Self { config, params, ropes, states, embedding: Param(0), ignored };
        new.embedding = new.param(format!("{module}.weight"), shape, Role::Embedding);
        new
    }

    /// Ends with the last norm and, where it is not the embedding, the head.
    pub(crate) fn finish(mut self, norm: Norm) -> Outline {
        let shape = vec![self.config.vocab_size, self.config.hidden_size];
        let weight = match self.config.tied_head {
            true => self.embedding,
            false => self.param("lm_head.weight".to_owned(), shape, Role::Head),
        };
        let Self { config, params, ropes, states, embedding, ignored } = self;
        Outline { config, params, ropes, states, embedding, ignored, norm, head: Linear { weight, bias: None } }
    }

    /// Says that files may have a tensor `name`, which nothing reads.
    pub(crate) fn ignore(&mut self, name: String) {
        self.ignored.push(name);
    }

    /// A further embedding.
    pub(crate) fn embedding(&mut self, module: &str, rows: usize, width: usize) -> Param {
        self.param(format!("{module}.weight"), vec![rows, width], Role::Embedding)
    }

    fn param(&mut self, name: String, shape: Vec<usize>, role: Role) -> Param {
        self.params.push(ParamSpec { name, shape, role, layout: Layout::Whole, module: None });
        Param(number(self.params.len()))
    }

    pub(crate) fn vector(&mut self, name: String, width: usize) -> Param {
        self.param(name, vec![width], Role::Vector)
    }

    /// A parameter of one value and no dimension.
    pub(crate) fn number(&mut self, name: String) -> Param {
        self.param(name, Vec::new(), Role::Vector)
    }

    pub(crate) fn rms_norm(&mut self, module: &str, width: usize, eps: f32) -> Norm {
        let weight = self.vector(format!("{module}.weight"), width);
        Norm { weight: Some(weight), width, eps, plus_one: false, centered: false, bias: None }
    }

    pub(crate) fn layer_norm(&mut self, module: &str, width: usize, eps: f32) -> Norm {
        let norm = self.rms_norm(module, width, eps);
        Norm { centered: true, bias: Some(self.vector(format!("{module}.bias"), width)), ..norm }
    }

    /// The same for a layer that has another name among modules than its tensors in files.
    pub(crate) fn linear_as(&mut self, names: [&str; 2], out: usize, input: usize, bias: bool) -> Linear {
        let linear = self.linear(names[0], out, input, bias);
        self.params[linear.weight.0 as usize].module = Some(names[1].to_owned());
        linear
    }

    pub(crate) fn linear(&mut self, module: &str, out: usize, input: usize, bias: bool) -> Linear {
        let weight = self.param(format!("{module}.weight"), vec![out, input], Role::Linear);
        let bias = bias.then(|| self.vector(format!("{module}.bias"), out));
        Linear { weight, bias }
    }

    /// A linear layer that adapters leave alone.
    pub(crate) fn fixed(&mut self, module: &str, out: usize, input: usize, bias: bool) -> Linear {
        let linear = self.linear(module, out, input, bias);
        self.params[linear.weight.0 as usize].role = Role::Fixed;
        linear
    }

    /// A linear layer with a bias, whose weight files hold as `[in, out]`.
    pub(crate) fn transposed(&mut self, module: &str, out: usize, input: usize) -> Linear {
        let linear = self.linear(module, out, input, true);
        self.params[linear.weight.0 as usize].layout = Layout::Transposed;
        linear
    }

    /// A linear layer with a bias that adapters leave alone, whose weight files hold as `[in, out]`.
    pub(crate) fn expert(&mut self, module: &str, out: usize, input: usize) -> Linear {
        let linear = self.transposed(module, out, input);
        self.params[linear.weight.0 as usize].role = Role::Fixed;
        linear
    }

    /// Rows of a stack of matrices in the tensor `name`, as a linear layer.
    pub(crate) fn stacked(&mut self, name: &str, stack: Stack, rows: usize) -> Linear {
        let shape = vec![rows, stack.shape[2]];
        self.params.push(ParamSpec {
            name: name.to_owned(),
            shape,
            role: Role::Fixed,
            layout: Layout::Stacked(stack),
            module: None,
        });
        Linear { weight: Param(number(self.params.len())), bias: None }
    }

    pub(crate) fn router(&mut self, module: &str, experts: usize, input: usize) -> Linear {
        let weight = self.param(format!("{module}.weight"), vec![experts, input], Role::Router);
        Linear { weight, bias: None }
    }

    pub(crate) fn conv(&mut self, module: &str, channels: usize, taps: usize, bias: bool) -> (Conv, StateId) {
        let weight = self.param(format!("{module}.weight"), vec![channels, 1, taps], Role::Vector);
        let bias = bias.then(|| self.vector(format!("{module}.bias"), channels));
        (Conv { weight, bias }, self.state(StateSpec::Conv { channels, taps }))
    }

    /// The same table for equal angles.
    pub(crate) fn rope(&mut self, rope: Rope) -> RopeTable {
        if let Some(known) = self.ropes.iter().position(|known| *known == rope) {
            return RopeTable(number(known + 1));
        }
        self.ropes.push(rope);
        RopeTable(number(self.ropes.len()))
    }

    pub(crate) fn state(&mut self, spec: StateSpec) -> StateId {
        self.states.push(spec);
        StateId(number(self.states.len()))
    }
}

/// The number of the last of so many things.
fn number<N: TryFrom<usize>>(things: usize) -> N {
    N::try_from(things - 1).ok().expect("config bounds the number of layers")
}
