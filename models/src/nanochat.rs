//! nanochat (Karpathy 2025): norms without weights, one of them behind the embedding; heads turn the other way round and are
//! normed then; a squared ReLU, and logits held below a bound.

use crate::attention::{AttentionSpec, QkNorms};
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{Decoder, NormKind, Variant};
use crate::exec::Exec;
use crate::feed_forward::Inner;
use crate::keys::Keys;
use crate::op::{Linear, Map, Value};
use crate::outline::Outline;
use crate::rope::{Rope, RopeKeys};
use crate::windows;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "nanochat",
    honoured: &["hidden_act", "attention_bias", "final_logit_softcapping"],
    scaled: None,
    build,
};

struct NanoChat {
    decoder: Decoder,
    softcap: Option<f32>,
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 2048, ..Defaults::default() })?;
    keys.one_of("hidden_act", &["relu2"])?;
    let (eps, bias) = (keys.share("rms_norm_eps", 1e-6)?, keys.flag("attention_bias", false)?);
    let rope = RopeKeys::of(&config).read(keys)?;
    // It turns back where others turn.
    let rope = Rope { inv_freq: rope.inv_freq.iter().map(|frequency| -frequency).collect(), ..rope };
    let norms = Some(QkNorms { weights: false, after_rope: true, ..QkNorms::of_heads(eps) });
    let variant = Variant {
        attention: AttentionSpec { qkv_bias: bias, o_bias: bias, norms, ..AttentionSpec::default() },
        ropes: Some(rope.everywhere(&config)),
        mlp: Inner::Plain(Map::SquaredRelu, ["fc1", "fc2"]),
        norm: NormKind::Bare,
        ..Variant::new(eps, windows::none(keys, &config)?)
    };
    let softcap = keys.positive_or("final_logit_softcapping", Some(15.0))?.map(|cap| cap as f32);
    Ok(Box::new(NanoChat { decoder: Decoder::new(keys, config, &variant, &|_, _, _| None)?, softcap }))
}

impl Model for NanoChat {
    fn outline(&self) -> &Outline {
        &self.decoder.outline
    }

    fn embed(&self, ex: &mut dyn Exec) -> Value {
        let x = ex.embed(self.decoder.outline.embedding);
        ex.norm(self.decoder.outline.norm, x)
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        self.decoder.layer(ex, index, x)
    }

    fn plain_head(&self) -> Option<Linear> {
        self.softcap.is_none().then_some(self.decoder.outline.head)
    }

    fn head(&self, ex: &mut dyn Exec, x: Value) -> Value {
        let h = self.norm(ex, x);
        let y = ex.linear(self.decoder.outline.head, h);
        self.softcap.map_or(y, |cap| ex.map(Map::Softcap(cap), y))
    }
}
