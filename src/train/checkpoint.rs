//! The state of a run between two steps: one safetensors file that replaces the one before in a single step.

use crate::error::{Error, ErrorCode, Result};
use crate::format::widen;
use crate::mmap;
use pocketlora_kernels::FloatType;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Name of the file in the output folder.
const FILE: &str = "checkpoint.safetensors";
/// Key of the run's facts in the file's metadata.
const META: &str = "pocketlora";

/// What a checkpoint belongs to and where it stands. A resumed run must agree on all but `step`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunFacts {
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub total_steps: u64,
    /// The run's settings as JSON.
    pub config: serde_json::Value,
    /// Fingerprint of the data.
    pub data: u64,
    /// Fingerprint of the base model.
    pub base: u64,
    /// The adapter that training continues from, as a fingerprint; 0 for a fresh one.
    pub init: u64,
}

impl RunFacts {
    /// Names what differs from `other`, apart from the step.
    fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        if let (Some(a), Some(b)) = (self.config.as_object(), other.config.as_object()) {
            for key in a.keys().chain(b.keys().filter(|k| !a.contains_key(*k))) {
                let text = |v: Option<&serde_json::Value>| v.map_or_else(|| "nothing".to_owned(), ToString::to_string);
                if a.get(key) != b.get(key) {
                    found.push(format!("`{key}` was {}, is {}", text(a.get(key)), text(b.get(key))));
                }
            }
        }
        for (name, a, b) in [
            ("data", self.data, other.data),
            ("base model", self.base, other.base),
            ("initial adapter", self.init, other.init),
        ] {
            if a != b {
                found.push(format!("the {name} changed"));
            }
        }
        if found.is_empty() && self.total_steps != other.total_steps {
            found.push(format!("{} steps in all became {}", self.total_steps, other.total_steps));
        }
        found
    }
}

/// A trained tensor with its optimizer state on the host.
pub struct TensorState {
    /// Full PEFT name.
    pub name: String,
    /// Row-major shape.
    pub shape: [usize; 2],
    /// Master, first and second moment.
    pub values: [Vec<f32>; 3],
}

const PARTS: [&str; 3] = ["param", "m", "v"];

/// Path of the checkpoint in an output folder.
pub fn path_in(out: &Path) -> PathBuf {
    out.join(FILE)
}

/// Writes a checkpoint.
///
/// # Errors
/// The file cannot be written; the one before it is kept then.
pub fn save(out: &Path, facts: &RunFacts, tensors: &[TensorState]) -> Result<()> {
    let path = path_in(out);
    let raw: Vec<(String, [usize; 2], Vec<u8>)> = tensors
        .iter()
        .flat_map(|t| PARTS.iter().zip(&t.values).map(move |(part, v)| (t, part, v)))
        .map(|(t, part, v)| (format!("{part}.{}", t.name), t.shape, v.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let bug = |e| Error::format(&path, "tensors", "consistent views", "a mismatch").caused_by(e);
    let views: Vec<(&str, TensorView<'_>)> = raw
        .iter()
        .map(|(name, shape, data)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.to_vec(), data)?)))
        .collect::<Result<_, safetensors::SafeTensorError>>()
        .map_err(bug)?;
    let text = serde_json::to_string(facts).expect("plain data serializes");
    let file = safetensors::serialize(views, Some(HashMap::from([(META.to_owned(), text)]))).map_err(bug)?;
    crate::format::write_bytes(&path, &file)
}

/// Reads the checkpoint in `out` back, if it belongs to the run that `facts` describe. `layout` lists the names and
/// shapes that it must have. Returns the steps done and the tensors in the order of `layout`.
///
/// # Errors
/// There is none, it is broken, or it belongs to a run with other settings, data or base (the differences are listed).
pub fn load(out: &Path, facts: &RunFacts, layout: &[(String, [usize; 2])]) -> Result<(u64, Vec<TensorState>)> {
    let path = path_in(out);
    if !path.exists() {
        let message = "expected a checkpoint to resume from, got none; start without `--resume`";
        return Err(Error::new(ErrorCode::Data, format!("`{}`", path.display()), message));
    }
    let bytes = mmap::map(&path)?;
    let broken = |what: &str, got: &dyn std::fmt::Display| {
        let message = format!("expected {what}, got {got}; start again without `--resume`");
        Error::new(ErrorCode::Format, format!("`{}`", path.display()), message)
    };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| broken("a complete checkpoint", &e))?;
    let text = header.metadata().as_ref().and_then(|m| m.get(META));
    let text = text.ok_or_else(|| broken("the run's facts", &"none"))?;
    let saved: RunFacts = serde_json::from_str(text).map_err(|e| broken("the run's facts", &e))?;
    let differences = saved.differences(facts);
    if !differences.is_empty() {
        let message = format!(
            "the run to resume differs: {}; use the same settings, data and base, or start again without `--resume`",
            differences.join("; ")
        );
        return Err(Error::new(ErrorCode::Config, format!("`{}`", path.display()), message));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|e| broken("a complete checkpoint", &e))?;
    let part = |name: &str, shape: &[usize; 2]| -> Result<Vec<f32>> {
        let view = file.tensor(name).map_err(|e| broken(&format!("tensor `{name}`"), &e))?;
        if view.dtype() != Dtype::F32 || view.shape() != shape {
            return Err(broken(
                &format!("tensor `{name}` in F32 of shape `{shape:?}`"),
                &format!("{:?}", view.shape()),
            ));
        }
        let mut values = vec![0.0; shape[0] * shape[1]];
        widen(FloatType::F32, view.data(), &mut values);
        Ok(values)
    };
    let tensors = layout.iter().map(|(name, shape)| {
        let [p, m, v] = PARTS.map(|prefix| part(&format!("{prefix}.{name}"), shape));
        Ok(TensorState { name: name.clone(), shape: *shape, values: [p?, m?, v?] })
    });
    Ok((saved.step, tensors.collect::<Result<_>>()?))
}

/// Removes the checkpoint of a finished run.
///
/// # Errors
/// The system refuses.
pub fn remove(out: &Path) -> Result<()> {
    let path = path_in(out);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", &path, e)),
        _ => Ok(()),
    }
}
