//! The copy of a head in 8 bits: near the original, made again when damaged or out of date, missed by nobody.

use crate::common::values_of;
use half::f16;
use pocketlora::format::{Checkpoint, int8_head};
use pocketlora_kernels::{Backend, Call, Cpu, MatrixSource, Memory};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

const NAME: &str = "lm_head.weight";
const ROWS: usize = 16 * 1024;
const COLS: usize = 64;

/// A checkpoint with nothing but a head whose values depend on `seed`.
fn checkpoint(dir: &Path, rows: usize, cols: usize, seed: usize) -> Checkpoint {
    let value = |i: usize| f16::from_f32(((i * 37 + seed) % 1009) as f32 / 500.0 - 1.0);
    let bytes: Vec<u8> = (0..rows * cols).flat_map(|i| value(i).to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F16, vec![rows, cols], &bytes).unwrap();
    fs::create_dir_all(dir).unwrap();
    safetensors::serialize_to_file([(NAME, view)], None, &dir.join("model.safetensors")).unwrap();
    fs::write(dir.join("config.json"), format!("{{\"seed\": {seed}}}")).unwrap();
    Checkpoint::open(dir).unwrap()
}

/// All rows as the kernels decode them.
fn rows(source: MatrixSource) -> Vec<f32> {
    let cpu = Cpu::new(1);
    let ids: Vec<u32> = (0..source.rows as u32).collect();
    let mut y = cpu.buffer(source.rows * source.cols).unwrap();
    cpu.run(Call::Embed { table: &cpu.matrix(source).unwrap(), ids: &ids, y: &mut y }).unwrap();
    values_of(&cpu, &y)
}

/// What tells a file from another one that took its name.
fn identity(path: &Path) -> u64 {
    #[cfg(unix)]
    return std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    #[cfg(not(unix))]
    return fs::metadata(path).unwrap().len();
}

#[test]
fn the_copy_is_near_the_original_and_made_again_when_damaged() {
    let temp = tempfile::tempdir().unwrap();
    let (model, cache) = (temp.path().join("model"), temp.path().join("cache"));
    let head = checkpoint(&model, ROWS, COLS, 1);
    let original = rows(head.matrix(NAME).unwrap());
    let check = |what: &str| {
        let (source, mapped) = int8_head(&head, NAME, &cache).unwrap().expect(what);
        assert!(mapped as usize >= ROWS * (COLS + 4) && (mapped as usize) < ROWS * COLS * 2, "{what}: {mapped} bytes");
        let worst = rows(source).iter().zip(&original).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= 0.5001 * 1.02 / 127.0, "{what}: off by {worst}");
        let files: Vec<_> = fs::read_dir(&cache).unwrap().map(|f| f.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{what}: {files:?}");
        files[0].clone()
    };
    let file = check("made");
    // A copy that is made again is another file; one that is used again is only as new as its last use.
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    fs::File::options().append(true).open(&file).unwrap().set_modified(long_ago).unwrap();
    let first = identity(&file);
    assert_eq!(identity(&check("used again")), first);
    assert!(fs::metadata(&file).unwrap().modified().unwrap() > long_ago);
    fs::write(&file, b"broken").unwrap();
    check("damaged");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 100]).unwrap();
    check("cut short");
}

#[test]
fn another_model_in_the_same_place_gets_another_copy() {
    let temp = tempfile::tempdir().unwrap();
    let (model, cache) = (temp.path().join("model"), temp.path().join("cache"));
    let first = rows(int8_head(&checkpoint(&model, ROWS, COLS, 1), NAME, &cache).unwrap().unwrap().0);
    let second = checkpoint(&model, ROWS, COLS, 2);
    let second = rows(int8_head(&second, NAME, &cache).unwrap().unwrap().0);
    assert_ne!(first, second);
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 2);
}

#[test]
fn where_a_copy_is_of_no_use_or_cannot_be_kept_there_is_none() {
    let temp = tempfile::tempdir().unwrap();
    let cache = temp.path().join("cache");
    let small = checkpoint(&temp.path().join("small"), 100, COLS, 1);
    assert!(int8_head(&small, NAME, &cache).unwrap().is_none());
    let odd = checkpoint(&temp.path().join("odd"), 20_000, 70, 1);
    assert!(int8_head(&odd, NAME, &cache).unwrap().is_none());
    assert!(!cache.exists());
    let blocked = temp.path().join("a-file");
    fs::write(&blocked, b"").unwrap();
    let large = checkpoint(&temp.path().join("large"), ROWS, COLS, 1);
    assert!(int8_head(&large, NAME, &blocked).unwrap().is_none());
    assert!(int8_head(&large, "no.such.weight", &cache).is_err());
}
