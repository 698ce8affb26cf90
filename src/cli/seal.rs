//! `pocketlora seal` and `pocketlora unseal`: an adapter in one encrypted file, and out of it.

use super::args::{options, print_json};
use super::{model, names, outputs};
use crate::adapter::AdapterFile;
use crate::adapter::seal::{self, Key, Opening, hex};
use crate::engine::{Engine, Options};
use crate::error::{Error, ErrorCode, Result};
use crate::format::{AtomicDir, create_folder, write_bytes};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(super) struct SealArgs {
    /// Folder of an adapter, or name of one in the cache.
    adapter: String,
    /// The base that it is for: directory, .gguf file, or name of a model in the cache.
    #[arg(short, long, default_value = model::DEFAULT)]
    model: String,
    /// File with the key: 32 bytes, or 64 hexadecimal digits.
    #[arg(long, value_parser = names::path())]
    key_file: PathBuf,
    /// Version, by which a host tells older seals from newer ones.
    #[arg(long = "version", default_value_t = 1)]
    number: u64,
    /// File with a secret Ed25519 key to sign the seal with, in the same form.
    #[arg(long, value_parser = names::path())]
    sign_key_file: Option<PathBuf>,
    /// File to write, NAME.sealed.
    #[arg(short, long, value_parser = names::path())]
    out: PathBuf,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(super) struct UnsealArgs {
    /// Sealed adapter.
    #[arg(value_parser = names::path())]
    file: PathBuf,
    /// File with the key that it was sealed with.
    #[arg(long, value_parser = names::path())]
    key_file: PathBuf,
    /// Refuse a seal for another base than this one.
    #[arg(short, long)]
    model: Option<String>,
    /// Refuse an older version.
    #[arg(long, default_value_t = 0)]
    least_version: u64,
    /// File with the public Ed25519 key of who must have signed it.
    #[arg(long, value_parser = names::path())]
    verify_key_file: Option<PathBuf>,
    /// Folder to write, where nothing is yet.
    #[arg(short, long, value_parser = names::path())]
    out: PathBuf,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn seal(args: &SealArgs) -> Result<()> {
    let dir = names::adapter(&args.adapter)?;
    let key = Key::read(&args.key_file)?;
    let signer = args.sign_key_file.as_deref().map(Key::read).transpose()?;
    let reads = [&args.key_file].into_iter().chain(&args.sign_key_file);
    outputs::check(&args.out, reads.map(PathBuf::as_path), seal::is_sealed)?;
    seal::parts_of(&dir)?;
    let engine = open(&args.model)?;
    let bytes = engine.seal(&dir, &key, args.number, signer.as_ref())?;
    write_bytes(&args.out, &bytes)?;
    let (base, signer) = (engine.content_hash()?, signer.map(|key| hex(&key.public())));
    if args.json {
        let report =
            json!({ "out": args.out, "bytes": bytes.len(), "version": args.number, "base": base, "signer": signer });
        print_json(&report);
    } else {
        println!("{}: version {}, {} bytes, for the base `{base}`", args.out.display(), args.number, bytes.len());
        signer.iter().for_each(|public| println!("signed; the public key is {public}"));
    }
    Ok(())
}

pub(super) fn unseal(args: &UnsealArgs) -> Result<()> {
    let key = Key::read(&args.key_file)?;
    let signer = args.verify_key_file.as_deref().map(Key::read).transpose()?.map(|key| *key.bytes());
    let bytes = fs::read(&args.file).map_err(|e| Error::io("read", &args.file, e))?;
    if args.out.exists() {
        let message = "expected a place where nothing is, got something; name another folder";
        return Err(Error::new(ErrorCode::Config, format!("`{}`", args.out.display()), message));
    }
    let base = args.model.as_deref().map(|model| open(model)?.content_hash()).transpose()?;
    let how = Opening { key: &key, base: base.as_deref(), least_version: args.least_version, signer };
    let sealed = seal::open(&bytes, &args.file, &how)?;
    AdapterFile::from_parts(sealed.parts.clone(), &args.file)?;
    let dir = AtomicDir::create(&args.out, |_| false)?;
    for (name, bytes) in &sealed.parts {
        let path = dir.path().join(name);
        create_folder(path.parent().unwrap_or(Path::new(".")))?;
        write_bytes(&path, bytes)?;
    }
    dir.commit()?;
    let signer = sealed.signer.map(|key| hex(&key));
    if args.json {
        print_json(&json!({ "out": args.out, "version": sealed.version, "base": sealed.base, "signer": signer }));
    } else {
        println!("{}: version {}, for the base `{}`", args.out.display(), sealed.version, sealed.base);
        signer.iter().for_each(|public| println!("signed by {public}"));
    }
    Ok(())
}

fn open(model: &str) -> Result<Engine> {
    let found = model::resolve(model, true)?;
    Engine::open(&found.path, &Options { ids_only: true, base_name: Some(found.name), ..options() })
}
