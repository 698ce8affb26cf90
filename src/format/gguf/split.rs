//! A model in several GGUF files, `NAME-00001-of-00003.gguf` and so on: the first has the metadata, each has some of the
//! tensors (llama.cpp's `gguf-split`).

use super::container::Container;
use crate::error::{Error, ErrorCode, Result};
use crate::mmap;
use std::path::{Path, PathBuf};

const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";
const TENSORS: &str = "split.tensors.count";
/// Digits of a number in a file's name.
const DIGITS: usize = 5;
/// More files than any model has.
const MOST: usize = 99_999;

/// The files of which `path` is one, by its name, the first one first; `path` alone if it is whole.
pub(crate) fn parts_of(path: &Path) -> Vec<PathBuf> {
    let parts = || {
        let name = path.file_name()?.to_str()?;
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (base, number) = rest.rsplit_once('-')?;
        let read = |digits: &str| {
            let plain = digits.len() == DIGITS && digits.bytes().all(|b| b.is_ascii_digit());
            digits.parse::<usize>().ok().filter(|_| plain)
        };
        let (number, count) = (read(number)?, read(count)?);
        let name = |n: usize| path.with_file_name(format!("{base}-{n:05}-of-{count:05}.gguf"));
        ((1..=count.min(MOST)).contains(&number)).then(|| (1..=count).map(name).collect())
    };
    parts().unwrap_or_else(|| vec![path.to_owned()])
}

/// Refuses one of several files alone.
///
/// # Errors
/// `file` is one.
pub(super) fn check_whole(file: &Container) -> Result<()> {
    let meta = &file.metadata;
    match meta.uint(COUNT)?.filter(|&n| n > 1) {
        None => Ok(()),
        Some(parts) => {
            let what = format_args!("one of {parts} parts of a GGUF model by itself");
            Err(Error::unsupported(meta.path(), what, "open it by its name, with the others beside it"))
        }
    }
}

/// Maps the file at `path` with all that belong to it.
///
/// # Errors
/// One of them is missing, broken or of another model.
pub(super) fn open(path: &Path) -> Result<Container> {
    let paths = parts_of(path);
    let missing: Vec<String> = paths.iter().filter(|p| !p.exists()).map(|p| format!("`{}`", p.display())).collect();
    if paths.len() > 1 && !missing.is_empty() {
        let shown = missing[..missing.len().min(10)].join(", ");
        let message =
            format!("expected {} files that belong together, got all but {shown}; fetch those, too", paths.len());
        return Err(Error::new(ErrorCode::Io, format!("`{}`", path.display()), message));
    }
    let mut first = Container::parse(mmap::map(&paths[0])?, &paths[0])?;
    let count = first.metadata.uint(COUNT)?.unwrap_or(1);
    if count.max(1) != paths.len() {
        let expected = format!("a name that ends in `-00001-of-{count:05}.gguf`, for the model is in {count} files");
        return Err(Error::format(&paths[0], "name", expected, "another one; give it the name that it had"));
    }
    for (number, path) in paths.iter().enumerate().skip(1) {
        let part = Container::parse(mmap::map(path)?, path)?;
        let meta = &part.metadata;
        for (key, expected) in [(NUMBER, number), (COUNT, count)] {
            let got = meta.required(key, meta.uint(key)?)?;
            if got != expected {
                return Err(meta.fail(key, expected, got));
            }
        }
        first.join(part, path)?;
    }
    let expected = if count > 1 { first.metadata.uint(TENSORS)? } else { None };
    match expected.filter(|expected| *expected != first.tensors.len()) {
        Some(expected) => Err(first.metadata.fail(TENSORS, first.tensors.len(), expected)),
        None => Ok(first),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_told_by_the_name() {
        let names = |name: &str| -> Vec<String> {
            parts_of(Path::new(name)).iter().map(|p| p.to_string_lossy().into_owned()).collect()
        };
        let both = ["d/m-q4-00001-of-00002.gguf", "d/m-q4-00002-of-00002.gguf"];
        assert_eq!(names("d/m-q4-00002-of-00002.gguf"), both);
        for whole in
            ["m.gguf", "m-1-of-2.gguf", "m-00003-of-00002.gguf", "m-00000-of-00002.gguf", "m-0000x-of-00002.gguf"]
        {
            assert_eq!(names(whole), [whole]);
        }
    }
}
