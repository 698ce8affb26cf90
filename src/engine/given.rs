//! A model whose files an app hands over one by one: open files, and where in them the bytes lie, as those of an Android
//! package or of a bundle do.

use super::{Engine, Options};
use crate::error::{Error, ErrorCode, Result};
use crate::format::{Checkpoint, create_folder};
use crate::mmap::map_part;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Component, Path};

/// Files with this ending are mapped where they lie. All others are small, and copied.
const MAPPED: &str = ".safetensors";
/// Most bytes of a file that is copied: the largest tokenizers have some 40 MB.
const MOST: u64 = 256 << 20;

/// One file of a model, open.
pub struct GivenFile {
    /// Its name in the model's folder, such as `config.json`.
    pub name: String,
    /// What its bytes lie in.
    pub file: File,
    /// The first of them.
    pub offset: u64,
    /// How many there are.
    pub len: u64,
}

impl Engine {
    /// Opens a model by its files. Weights are mapped where they lie. The others, some megabytes, are copied into a folder of
    /// their own in `scratch`, which goes when the engine is closed; what a killed app left of earlier ones may be removed at
    /// any time.
    ///
    /// # Errors
    /// A name is no plain file name or comes twice; bytes are not there; the disk refuses; as [`Engine::open`].
    pub fn open_given(files: Vec<GivenFile>, scratch: &Path, options: &Options) -> Result<Self> {
        options.check()?;
        create_folder(scratch)?;
        let failed = |e| Error::io("create a folder in", scratch, e);
        let dir = tempfile::Builder::new().prefix("model-").tempdir_in(scratch).map_err(failed)?;
        let mut weights = HashMap::new();
        for GivenFile { name, mut file, offset, len } in files {
            let mut parts = Path::new(&name).components();
            let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
            let path = dir.path().join(&name);
            if !plain || path.exists() || weights.contains_key(&name) {
                let message = "expected the names of a model's files, each once and without folders, got another";
                return Err(Error::new(ErrorCode::Config, format!("file `{name}`"), message));
            }
            if name.ends_with(MAPPED) {
                weights.insert(name, map_part(&file, offset, len, &path)?);
                continue;
            }
            if len > MOST {
                return Err(Error::format(&path, "length", format!("at most {MOST} bytes, as it is copied"), len));
            }
            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(offset)).map_err(|e| Error::io("read", &path, e))?;
            file.take(len).read_to_end(&mut bytes).map_err(|e| Error::io("read", &path, e))?;
            if bytes.len() as u64 != len {
                return Err(Error::format(&path, "length", format!("{len} bytes from byte {offset} on"), bytes.len()));
            }
            fs::write(&path, bytes).map_err(|e| Error::io("write", &path, e))?;
        }
        let checkpoint = Checkpoint::open_given(dir.path(), &weights)?;
        Self::of(checkpoint, options, Some(dir))
    }
}
