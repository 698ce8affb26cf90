//! What `pull` knows by name: one TOML file per model in `models/manifests/`, compiled in.

use crate::error::{Error, ErrorCode, Result};
use crate::hub::name::{self, OnHub};
use serde::Deserialize;
use std::fmt;

/// The files, in the order in which `pull` lists them. A new model is a new line here.
const FILES: &[&str] = &[
    include_str!("../../models/manifests/smollm2-135m.toml"),
    include_str!("../../models/manifests/gemma3-270m.toml"),
    include_str!("../../models/manifests/qwen2.5-coder-0.5b.toml"),
    include_str!("../../models/manifests/qwen2.5-coder-1.5b.toml"),
];

/// One model that has a short name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The short name, also its folder in the cache.
    pub name: String,
    /// What people call it, and who made it.
    pub title: String,
    /// SPDX identifier of the weights' licence, shown before anything is fetched.
    pub licence: String,
    /// Settings that suit this model better than the program's own.
    #[serde(default)]
    pub defaults: Defaults,
    /// Where to get it, best first.
    #[serde(rename = "source")]
    pub sources: Vec<Source>,
}

/// Settings that suit a model better than the program's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    /// Context length in tokens.
    pub context: Option<usize>,
}

/// One place that has the model.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Source {
    /// A repository on a model hub.
    Hub(Repository),
    /// One file inside a Python wheel, or cut into several.
    Wheel(Wheel),
}

/// A repository on a model hub.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Repository {
    /// `OWNER/REPO`.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// What to fetch; empty means whatever of the repository a model needs.
    #[serde(default)]
    pub files: Vec<String>,
}

/// One file inside a Python wheel, or cut into several because an index bounds the size of a wheel.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Wheel {
    /// The file's name in the cache.
    pub file: String,
    /// Size of the file: the bar's end, and a limit for what hostile archives may unpack to.
    pub bytes: u64,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub sha256: String,
    /// Whether somebody else than the model's makers put it there.
    #[serde(default)]
    pub unofficial: bool,
    /// Where its pieces are, which are joined in this order.
    pub parts: Vec<Part>,
}

/// A piece of a file, or all of it, inside one Python wheel.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Package name.
    pub package: String,
    /// Exact version.
    pub version: String,
    /// Path of the piece inside the wheel.
    pub member: String,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=={}", self.package, self.version)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub(hub) => write!(f, "hub repository {} at {}", hub.repo, hub.revision),
            Self::Wheel(wheel) => {
                let kind = if wheel.unofficial { "unofficial Python" } else { "Python" };
                match &wheel.parts[..] {
                    [first, .., last] => write!(f, "{} {kind} wheels, {first} to {last}", wheel.parts.len()),
                    parts => parts.iter().try_for_each(|part| write!(f, "{kind} wheel {part}")),
                }
            }
        }
    }
}

impl Manifest {
    /// The model `wanted`: a short name, or `OWNER/REPO[:FILE.gguf][@REVISION]` on the hub.
    ///
    /// # Errors
    /// Neither a known name nor the form of a repository's.
    pub fn find(wanted: &str) -> Result<Self> {
        let known = all()?;
        if let Some(manifest) = known.iter().find(|m| m.name == wanted) {
            return Ok(manifest.clone());
        }
        if let Some(OnHub { repo, file, revision }) = name::on_hub(wanted) {
            let repo = Repository {
                repo: repo.into(),
                revision: revision.unwrap_or("main").into(),
                files: file.into_iter().map(str::to_owned).collect(),
            };
            return Ok(Self {
                name: wanted.into(),
                title: wanted.into(),
                licence: "see the repository's page".into(),
                defaults: Defaults::default(),
                sources: vec![Source::Hub(repo)],
            });
        }
        let names = known.iter().map(|m| m.name.as_str()).collect::<Vec<_>>().join("`, `");
        Err(Error::config(
            "model",
            format!("one of `{names}`, or `OWNER/REPO[:FILE.gguf][@REVISION]` on the hub"),
            wanted,
        ))
    }

    /// Reads a manifest, also one that an app brings.
    ///
    /// # Errors
    /// `Format`: no TOML, a missing or unknown key, a name that could lead out of the cache.
    pub fn parse(text: &str) -> Result<Self> {
        let manifest: Self = toml::from_str(text)
            .map_err(|e| Error::new(ErrorCode::Format, "model manifest", "could not be read").caused_by(e))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Whether every name in it may become a file's name.
    pub(super) fn check(&self) -> Result<()> {
        let files = self.sources.iter().flat_map(|source| match source {
            Source::Hub(hub) => hub.files.iter().map(String::as_str).collect(),
            Source::Wheel(wheel) => vec![wheel.file.as_str()],
        });
        let empty = self.sources.iter().any(|source| matches!(source, Source::Wheel(wheel) if wheel.parts.is_empty()));
        let place = || format!("manifest of `{}`", self.name);
        let is_right = |f: &str| if name::on_hub(&self.name).is_some() { name::is_path(f) } else { name::is_plain(f) };
        match files.into_iter().find(|f| !is_right(f)) {
            _ if name::folder(&self.name).is_none() => {
                Err(Error::new(ErrorCode::Format, place(), "expected a plain `name`"))
            }
            Some(bad) => {
                Err(Error::new(ErrorCode::Format, place(), format!("expected a plain file name, got `{bad}`")))
            }
            None if empty => Err(Error::new(ErrorCode::Format, place(), "expected at least one wheel in `parts`")),
            None => Ok(()),
        }
    }
}

/// Every model that has a short name.
///
/// # Errors
/// A compiled-in manifest is broken: a bug, which the tests catch.
pub fn all() -> Result<Vec<Manifest>> {
    FILES.iter().map(|text| Manifest::parse(text)).collect()
}
