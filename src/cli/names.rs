//! From what people type to files and folders: what exists as typed is a path, whatever is in its name.

use crate::error::{Error, ErrorCode, Result};
pub(super) use crate::hub::expanded;
use crate::hub::{self, Hub};
use clap::builder::{OsStringValueParser, TypedValueParser};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// For clap: a path, with `~` for the home folder where the shell left it (`-o=~/x`).
pub(super) fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(|text: OsString| expanded(Path::new(&text)))
}

/// The path that `text` is, if there is something.
pub(super) fn existing(text: &str) -> Option<PathBuf> {
    // An empty path joined with a file's name would be that file here.
    let path = expanded(Path::new(text));
    (!text.is_empty() && path.exists()).then_some(path)
}

/// The folder of an adapter, given as a path or as the name of one in the cache.
pub(super) fn adapter(text: &str) -> Result<PathBuf> {
    known(text).ok_or_else(|| unknown(text, &format!("`{text}`")))
}

/// An adapter with its strength: `ADAPTER` or `ADAPTER=SCALE`.
pub(super) fn scaled_adapter(text: &str) -> Result<(PathBuf, f32)> {
    let split = text.rsplit_once('=').and_then(|(left, scale)| Some((left, scale, known(left)?)));
    let scale = |scale: &str| scale.trim().parse::<f32>().ok().filter(|s| s.is_finite());
    if let Some(dir) = known(text) {
        if let Some((left, number, _)) = split.filter(|(_, number, _)| scale(number).is_some()) {
            eprintln!("note: `{text}` is taken as the folder of that name, not as `{left}` at strength {number}");
        }
        return Ok((dir, 1.0));
    }
    match split {
        Some((_, number, dir)) => match scale(number) {
            Some(scale) => Ok((dir, scale)),
            None => {
                let message = format!("expected a finite number after the last `=`, got `{number}`");
                Err(Error::new(ErrorCode::Config, format!("adapter `{text}`"), message))
            }
        },
        None => {
            let looked = text.rsplit_once('=').map_or_else(String::new, |(left, _)| format!(" or `{left}`"));
            Err(unknown(text, &format!("`{text}`{looked}")))
        }
    }
}

/// The folder of the adapter called `text`, if there is one. A file of it stands for its folder.
fn known(text: &str) -> Option<PathBuf> {
    if let Some(path) = existing(text) {
        if cached(text).is_some() {
            eprintln!("note: `{text}` is taken as the path of that name here, not as the adapter in the cache");
        }
        const FILES: [&str; 3] = ["adapter_model.safetensors", "adapter_config.json", "adapters.safetensors"];
        let of_adapter = |n: &std::ffi::OsStr| FILES.iter().any(|file| n == *file);
        let folder = path.parent().filter(|_| path.is_file() && path.file_name().is_some_and(of_adapter));
        return Some(folder.map_or(path.clone(), |f| if f.as_os_str().is_empty() { ".".into() } else { f.to_owned() }));
    }
    cached(text)
}

/// An adapter that was pulled, or the one that `demo` trained.
fn cached(name: &str) -> Option<PathBuf> {
    let hub = Hub::from_env().ok()?;
    if let Some(path) = hub.resolve(name) {
        hub.touch(name);
        return Some(path);
    }
    let demo = hub.home.join("demo/adapter");
    (name == "demo" && demo.join("adapter_config.json").is_file()).then_some(demo)
}

fn unknown(text: &str, looked: &str) -> Error {
    let next = match hub::is_repository(text.rsplit_once('=').map_or(text, |(left, _)| left)) {
        true => "fetch it with `pocketlora pull OWNER/REPO` if it is on the model hub, or check the path",
        false => "check the path; `pocketlora list` shows the names in the cache",
    };
    let message = format!(
        "expected a folder with `adapter_config.json`, a GGUF file of an adapter, or the name of an adapter in the cache, but \
         there is no {looked}; {next}"
    );
    Error::new(ErrorCode::Config, format!("adapter `{text}`"), message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_exists_is_a_path_and_the_rest_is_split_at_the_last_equals_sign() {
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| temp.path().join(name).to_str().unwrap().to_owned();
        for name in ["plain", "lr=1e-4", "r", "r=2", "a=b", "mit Leerzeichen=é"] {
            fs::create_dir(at(name)).unwrap();
        }
        for (text, dir, scale) in [
            ("plain", "plain", 1.0),
            ("plain=0.5", "plain", 0.5),
            ("plain=-2", "plain", -2.0),
            ("lr=1e-4", "lr=1e-4", 1.0),
            ("lr=1e-4=1e-1", "lr=1e-4", 0.1),
            ("r=2", "r=2", 1.0),
            ("r=2.0", "r", 2.0),
            ("r=2=3", "r=2", 3.0),
            ("a=b=0", "a=b", 0.0),
            ("mit Leerzeichen=é", "mit Leerzeichen=é", 1.0),
            ("mit Leerzeichen=é=1", "mit Leerzeichen=é", 1.0),
        ] {
            assert_eq!(scaled_adapter(&at(text)).unwrap(), (at(dir).into(), scale), "{text}");
        }
        for (text, says) in [
            ("none", "no `"),
            ("none=1", "none`;"),
            ("plain=x", "finite number"),
            ("plain=inf", "finite number"),
            ("plain=NaN", "finite number"),
            ("plain=", "finite number"),
        ] {
            let error = scaled_adapter(&at(text)).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!(adapter(&at("plain=0.5")).is_err(), "no strength where none is wanted");
        fs::write(at("plain") + "/adapter_model.safetensors", "").unwrap();
        assert_eq!(adapter(&at("plain/adapter_model.safetensors")).unwrap(), PathBuf::from(at("plain")));
    }

    #[test]
    fn a_tilde_that_the_shell_left_is_the_home_folder() {
        let home = dirs::home_dir().unwrap();
        assert_eq!(expanded(Path::new("~/x y")), home.join("x y"));
        assert_eq!(expanded(Path::new("~")), home);
        for name in ["~x", "a/~", "./~/x", ""] {
            assert_eq!(expanded(Path::new(name)), Path::new(name));
        }
    }
}
