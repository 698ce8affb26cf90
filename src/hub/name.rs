//! Names that are safe as file names on every system: a model's name comes from the command line, a file's from a
//! server, and neither may lead out of the cache.

/// Windows opens a device instead of a file for these, whatever the extension.
const DEVICES: &[&str] = &["con", "prn", "aux", "nul"];

/// Whether `name` is one path component that every file system keeps as it is.
#[must_use]
pub fn is_plain(name: &str) -> bool {
    let stem = name.split('.').next().unwrap_or_default().to_ascii_lowercase();
    let numbered = |prefix| stem.strip_prefix(prefix).is_some_and(|n| n.len() == 1 && n != "0");
    (1..=128).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !name.starts_with(['.', '-'])
        && !name.ends_with('.')
        && !DEVICES.contains(&stem.as_str())
        && !numbered("com")
        && !numbered("lpt")
}

/// A model on the hub as people type it: `OWNER/REPO[:FILE.gguf][@REVISION]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnHub<'a> {
    /// `OWNER/REPO`.
    pub repo: &'a str,
    /// One file of it, with the folders that it lies in.
    pub file: Option<&'a str>,
    /// Branch, tag or commit.
    pub revision: Option<&'a str>,
}

/// Takes `name` apart, if it has that form and no part of it could lead anywhere else.
#[must_use]
pub fn on_hub(name: &str) -> Option<OnHub<'_>> {
    let (rest, revision) = name.split_once('@').map_or((name, None), |(rest, revision)| (rest, Some(revision)));
    let (repo, file) = rest.split_once(':').map_or((rest, None), |(repo, file)| (repo, Some(file)));
    let (owner, name_of_repo) = repo.split_once('/')?;
    let right = [owner, name_of_repo].into_iter().all(|part| is_plain(part) && !part.contains("--"))
        && file.is_none_or(|file| is_path(file) && file.to_ascii_lowercase().ends_with(".gguf"))
        && revision.is_none_or(is_path)
        && name.len() <= LONGEST;
    right.then_some(OnHub { repo, file, revision })
}

/// Longest name of a model: its folder's has a few bytes more, and file systems take 255.
const LONGEST: usize = 200;

/// Whether `path` is made of plain names with a `/` between them.
#[must_use]
pub fn is_path(path: &str) -> bool {
    path.split('/').all(is_plain)
}

/// The cache folder of the model `name`; `OWNER/REPO` becomes `OWNER--REPO`, as in the hub's own cache. What stands behind it
/// follows in letters that every file system takes and that no plain name has.
#[must_use]
pub fn folder(name: &str) -> Option<String> {
    if !name.contains('/') {
        return (is_plain(name) && !name.contains("--")).then(|| name.to_owned());
    }
    let OnHub { repo, file, revision } = on_hub(name)?;
    let mut folder = repo.replace('/', "--");
    for (mark, part) in [('+', file), ('@', revision)] {
        if let Some(part) = part {
            folder.push(mark);
            folder.push_str(&part.replace('/', SLASH));
        }
    }
    Some(folder)
}

/// What stands for a `/` inside a part.
const SLASH: &str = "%2F";

/// The model whose cache folder is `folder`.
#[must_use]
pub fn of_folder(folder: &str) -> String {
    folder.replacen("--", "/", 1).replacen('+', ":", 1).replace(SLASH, "/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_the_cache() {
        let bad = [
            "",
            ".",
            "..",
            "../x",
            "a/../b",
            "/etc",
            "a/b/c",
            "a\\b",
            "C:x",
            "a b",
            "nul",
            "NUL.gguf",
            "com1",
            "lpt9.x",
            "x.",
            "-x",
            ".x",
            "a--b",
            "a/b--c",
            "é",
            "a\0b",
            "a:b.gguf",
            "a@b",
            "a/b:c",
            "a/b:../c.gguf",
            "a/b:/c.gguf",
            "a/b@",
            "a/b@..",
            "a/b@x/../y",
            "a/b@main:c.gguf",
            "a/b:c.gguf:d.gguf",
            "a/b@c@d",
            "a/b:c//d.gguf",
        ];
        for name in bad {
            assert_eq!(folder(name), None, "{name:?}");
        }
        for name in [
            "smollm2-135m",
            "Owner_1/Repo-2.5",
            "console",
            "com10",
            "computer",
            "a/b:c-Q4_K_M.gguf",
            "a/b@refs/pr/1",
            "a/b:Q8_0/c-00001-of-00002.GGUF@v1.0--x",
        ] {
            assert_eq!(of_folder(&folder(name).expect(name)), name);
        }
    }
}
