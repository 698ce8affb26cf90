//! Which beginnings a LoRA can have on a model, and the plain LoRA that it is in the end.

use super::{Init, grown};
use crate::adapter::Tensors;
use crate::adapter::method::EMBEDDING;
use crate::adapter::methods::lora::Lora;
use crate::error::{Error, Result};
use pocketlora_models::{Model, Param};

impl Lora {
    /// Makes of what is trained, if that is more than a file has, the plain LoRA of twice the rank that the file has.
    pub(in crate::adapter) fn finish(&mut self, tensors: &mut Tensors) {
        if !std::mem::take(&mut self.init).is_taken_away() {
            return;
        }
        grown(tensors, 1.0, 1.0);
        self.grow();
    }

    /// The same with twice the rank, and the factor that it had.
    pub(in crate::adapter) fn grow(&mut self) {
        // What is divided by the rank, or by its root, is to stay as it is.
        let grown = if self.rslora { 2f64.sqrt() } else { 2.0 };
        (self.rank, self.alpha) = (2 * self.rank, grown * self.alpha);
        self.rank_pattern.iter_mut().for_each(|(_, rank)| *rank *= 2.0);
        self.alpha_pattern.iter_mut().for_each(|(_, alpha)| *alpha *= grown);
        self.exceptions.values_mut().for_each(|(rank, _)| *rank *= 2);
    }

    /// Refuses a beginning that some of `layers` cannot have.
    pub(in crate::adapter) fn check_init(&self, model: &dyn Model, layers: &[Param]) -> Result<()> {
        let random = matches!(self.init, Init::Plain | Init::Gaussian);
        if let Some(outside) = self.targets.iter().find(|t| !random && EMBEDDING.ends_with(t.as_str())) {
            let expected = format!("linear layers beside `init-lora-weights = {}`", self.init.name());
            return Err(Error::config("targets", expected, outside));
        }
        if self.init.is_taken_away() && self.invocation.is_some() {
            let expected = format!("none beside `init-lora-weights = {}`", self.init.name());
            return Err(Error::config("alora-invocation-tokens", expected, "some"));
        }
        for spec in layers.iter().map(|p| &model.params()[p.0 as usize]) {
            let (rank, _) = self.of_module(spec.module());
            let key = if rank == self.rank { "rank" } else { "rank-pattern" };
            if self.init == Init::Orthogonal && !rank.is_multiple_of(2) {
                return Err(Error::config(key, "an even number beside `init-lora-weights = orthogonal`", rank));
            }
            let (side, needed) = (spec.shape.iter().copied().min().unwrap_or(0), self.init.directions(rank));
            if needed > side {
                let per = needed / rank.max(1);
                let expected = format!(
                    "at most {} beside `init-lora-weights = {}`, for `{}` has {side} directions",
                    side / per.max(1),
                    self.init.name(),
                    spec.module()
                );
                return Err(Error::config(key, expected, rank));
            }
        }
        Ok(())
    }
}
