//! What an adapter was taught about, as one vector: the mean over its training texts of each text's mean row in the base's
//! embedding, `c = 1/n sum over texts of (1/T sum over t of E[id_t])`, `[C]`. It lies beside the adapter as
//! `centroid.safetensors`, which PEFT does not look at. Requests are compared with it (LoRARetriever, Zhao et al. 2024), see
//! `src/engine/router.rs`.
//!
//! A request costs no pass through the model that way. On SmolLM2 the mean of the last hidden states tells the sets of
//! `models/samples` apart less well, and so do rows weighted by how rare their tokens are.

use super::mark;
use crate::base::Base;
use crate::error::{Error, ErrorCode, Result};
use crate::format::safetensors::TensorFile;
use crate::format::{Entry, Writer, write_bytes};
use pocketlora_kernels::Backend;
use safetensors::Dtype;
use serde_json::json;
use std::path::Path;

/// Its name in the adapter's folder.
pub const CENTROID: &str = "centroid.safetensors";
/// The tensor in the file.
const TENSOR: &str = "centroid";
/// Key of how it was made, in the file's metadata, and how that is done here.
const WAY: [&str; 2] = ["way", "mean of embedding rows"];
/// Key of the number of texts.
const TEXTS: &str = "texts";
/// Texts that are looked at, spread over all, and tokens of each: more of them move a mean by less than another sample would.
const MOST_TEXTS: usize = 1024;
const MOST_TOKENS: usize = 256;

/// The mean of what an adapter was taught about.
#[derive(Clone, Debug, PartialEq)]
pub struct Centroid {
    /// `[C]`.
    pub values: Vec<f32>,
    /// How many texts it is the mean of.
    pub texts: u64,
}

impl Centroid {
    /// That of `all` texts, of which `text` gives one as tokens; those without a token of `base` do not count. None if that
    /// leaves none.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn of<B: Backend>(base: &Base<B>, all: usize, text: impl Fn(usize) -> Vec<u32>) -> Result<Option<Self>> {
        let (count, mut sum, mut seen) = (all.min(MOST_TEXTS), Vec::new(), 0);
        for i in 0..count {
            let Some(mean) = mean_row(base, &text(i * all / count))? else { continue };
            sum.resize(mean.len(), 0.0f64);
            sum.iter_mut().zip(mean).for_each(|(sum, value)| *sum += f64::from(value));
            seen += 1;
        }
        let values = sum.iter().map(|sum| (sum / f64::from(seen)) as f32).collect();
        Ok((seen > 0).then_some(Self { values, texts: all as u64 }))
    }

    /// This one and `other`, each with the weight of its texts. Of another width, `other` is of another model, and left out.
    #[must_use]
    pub fn joined(mut self, other: &Self) -> Self {
        if other.values.len() != self.values.len() {
            return self;
        }
        let all = self.texts + other.texts;
        let share = other.texts as f64 / all.max(1) as f64;
        for (value, other) in self.values.iter_mut().zip(&other.values) {
            *value = (f64::from(*value) * (1.0 - share) + f64::from(*other) * share) as f32;
        }
        self.texts = all;
        self
    }

    /// That of the adapter in the folder `dir`; none if it has no such file.
    ///
    /// # Errors
    /// The file is broken, or was made in another way.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(CENTROID);
        if !path.exists() {
            return Ok(None);
        }
        Self::parse(&TensorFile::open(&path)?).map(Some)
    }

    /// That in `file`.
    ///
    /// # Errors
    /// As [`Centroid::read`].
    pub(super) fn parse(file: &TensorFile) -> Result<Self> {
        let path = file.path();
        let broken = |expected: &str, got: &str| {
            let message = format!("expected {expected}, got {got}; write it anew with `pocketlora centroid`");
            Error::new(ErrorCode::Format, format!("`{}`", path.display()), message)
        };
        let way = file.metadata().get(WAY[0]).map_or("none", String::as_str);
        if way != WAY[1] {
            return Err(broken(&format!("a `{}` of `{}`", WAY[0], WAY[1]), &format!("`{way}`")));
        }
        let tensor = file.get(TENSOR)?;
        if tensor.dtype != Dtype::F32 || tensor.shape.len() != 1 || tensor.shape[0] == 0 {
            return Err(broken(&format!("`{TENSOR}` as a vector of F32"), &tensor.describe()));
        }
        let values: Vec<f32> =
            tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect();
        if !values.iter().all(|value| value.is_finite()) {
            return Err(broken("finite values", "others"));
        }
        let texts = file.metadata().get(TEXTS).and_then(|text| text.parse().ok()).unwrap_or(1);
        Ok(Self { values, texts })
    }

    /// Writes it beside the adapter in the folder `dir`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(CENTROID);
        let entry = Entry { name: TENSOR.to_owned(), dtype: Dtype::F32, shape: vec![self.values.len()] };
        let metadata = json!({ "format": "pt", WAY[0]: WAY[1], TEXTS: self.texts.to_string() });
        let mut bytes = Vec::new();
        let mut writer = Writer::new(std::io::Cursor::new(&mut bytes), metadata, vec![entry], Vec::new());
        let values: Vec<u8> = self.values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let failed = |e| Error::io("write", &path, e);
        writer.write(TENSOR, 0, &values).map_err(failed)?;
        writer.finish().map_err(failed)?;
        write_bytes(&path, &bytes)
    }
}

/// The mean row of the embedding of `base` over the tokens `ids`, `[C]`; ids that it does not have do not count. None without
/// any.
///
/// # Errors
/// Out of memory.
pub(crate) fn mean_row<B: Backend>(base: &Base<B>, ids: &[u32]) -> Result<Option<Vec<f32>>> {
    let known = |id: &u32| (*id as usize) < base.model.config().vocab_size;
    let ids: Vec<u32> = ids.iter().copied().filter(known).take(MOST_TOKENS).collect();
    if ids.is_empty() {
        return Ok(None);
    }
    let rows = mark::embedded(base, &ids)?;
    let mut sum = vec![0.0f64; rows.len() / ids.len()];
    for row in rows.chunks_exact(sum.len()) {
        sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
    }
    Ok(Some(sum.into_iter().map(|sum| (sum / ids.len() as f64) as f32).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_another_kind_is_refused_and_a_join_weighs_texts() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Centroid::read(dir.path()).unwrap(), None);
        let (one, other) =
            (Centroid { values: vec![1.0, 2.0], texts: 3 }, Centroid { values: vec![5.0, -2.0], texts: 1 });
        assert_eq!(one.clone().joined(&other), Centroid { values: vec![2.0, 1.0], texts: 4 });
        assert_eq!(one.clone().joined(&Centroid { values: vec![1.0], texts: 1 }), one);
        one.write(dir.path()).unwrap();
        assert_eq!(Centroid::read(dir.path()).unwrap(), Some(one.clone()));
        let path = dir.path().join(CENTROID);
        let good = std::fs::read(&path).unwrap();
        let text = |from: &str, to: &str| {
            let at = good.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
            let mut bytes = good.clone();
            bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
            bytes
        };
        let mut nan = good.clone();
        let end = nan.len();
        nan[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        for (bytes, says) in [
            (text("mean of embedding rows", "mean of embedding rowz"), "mean of embedding rowz"),
            (text("\"centroid\"", "\"centre_d\""), "centroid"),
            (text("F32", "I32"), "vector of F32"),
            (text("[2]", "[ ]"), "centroid"),
            (nan, "finite"),
            (good[..9].to_vec(), "centroid.safetensors"),
            (Vec::new(), "centroid.safetensors"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = Centroid::read(dir.path()).unwrap_err();
            assert!(error.to_string().contains(says), "{says}: {error}");
        }
    }
}
