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

/// The cache folder of the model `name`; `OWNER/REPO` becomes `OWNER--REPO`, as in the hub's own cache.
#[must_use]
pub fn folder(name: &str) -> Option<String> {
    let safe = |part: &str| is_plain(part) && !part.contains("--");
    match name.split_once('/') {
        Some((owner, repo)) => (safe(owner) && safe(repo)).then(|| format!("{owner}--{repo}")),
        None => safe(name).then(|| name.to_owned()),
    }
}

/// The model whose cache folder is `folder`.
#[must_use]
pub fn of_folder(folder: &str) -> String {
    folder.replacen("--", "/", 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_the_cache() {
        let bad = [
            "", ".", "..", "../x", "a/../b", "/etc", "a/b/c", "a\\b", "C:x", "a b", "nul", "NUL.gguf", "com1",
            "lpt9.x", "x.", "-x", ".x", "a--b", "a/b--c", "é", "a\0b",
        ];
        for name in bad {
            assert_eq!(folder(name), None, "{name:?}");
        }
        for name in ["smollm2-135m", "Owner_1/Repo-2.5", "console", "com10", "computer"] {
            assert_eq!(of_folder(&folder(name).expect(name)), name);
        }
    }
}
