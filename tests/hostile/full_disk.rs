//! A disk that is full. `ulimit -f` stands in for it: writes beyond the limit fail with EFBIG as they would with ENOSPC.

use super::common::{convert, tiny_chats};
use super::{Fixture, check_all, fixture, open};
use pocketlora::format::Target;
use pocketlora::train::{Observer, StepReport, TrainConfig};
use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs the command where no file may grow beyond `blocks` (of 512 or 1024 bytes, as the shell has it).
fn run(f: &Fixture, blocks: Option<u32>, args: &[&str]) -> Output {
    let limit = blocks.map_or_else(String::new, |n| format!("trap '' XFSZ; ulimit -f {n}; "));
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{limit}exec \"$0\" \"$@\"")).arg(env!("CARGO_BIN_EXE_pocketlora")).args(args);
    command.env("POCKETLORA_HOME", f.dir.path().join("home")).output().unwrap()
}

fn ok(f: &Fixture, args: &[&str]) {
    let done = run(f, None, args);
    assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Runs into the limit and checks what the user is told.
fn full(f: &Fixture, blocks: u32, args: &[&str], file: &str) -> Result<(), String> {
    let done = run(f, Some(blocks), args);
    let stderr = String::from_utf8_lossy(&done.stderr);
    let told =
        stderr.contains(file) && stderr.contains("could not write") && stderr.contains("caused by: File too large");
    if done.status.code() == Some(1) && told && !stderr.contains("panicked") {
        return Ok(());
    }
    Err(format!("{args:?} with {blocks} blocks: exit code {:?}, expected `{file}` in: {stderr}", done.status.code()))
}

/// What a run notes about itself as it goes: small enough for the limits here, and no result.
const RECORDS: [&str; 3] = ["log.jsonl", "loss.svg", "train.toml"];

/// Every file below `dir` with its content, without the records of runs.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(tree(&path));
            files.insert(path, Vec::new());
        } else if !RECORDS.iter().any(|name| path.ends_with(name)) {
            let content = fs::read(&path).unwrap();
            files.insert(path, content);
        }
    }
    files
}

/// Runs into the limit with `args` and checks that no file came, went or changed.
fn unharmed(f: &Fixture, blocks: u32, args: &[&str], file: &str) -> Result<(), String> {
    let before = tree(f.dir.path());
    full(f, blocks, args, file)?;
    let after = tree(f.dir.path());
    if before == after {
        return Ok(());
    }
    let names = |t: &BTreeMap<PathBuf, Vec<u8>>| t.keys().cloned().collect::<Vec<_>>();
    Err(format!("{args:?} with {blocks} blocks: {:?} became {:?}, or a content changed", names(&before), names(&after)))
}

struct StopAfter(u64);

impl Observer for StopAfter {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        if report.step == self.0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

#[test]
fn a_full_disk_in_training_costs_no_checkpoint_and_no_adapter() {
    let mut f = fixture();
    let nf4 = f.dir.path().join("nf4");
    convert(&f.model, &nf4, Target::Nf4);
    f.model = nf4;
    let data = tiny_chats(f.dir.path(), 6);
    let path = |name: &str| f.dir.path().join(name).to_str().unwrap().to_owned();
    let (model, data_arg) = (f.model.to_str().unwrap(), data.to_str().unwrap());
    let train = |out: &str, save_every: &str, more: &[&str]| -> Vec<String> {
        let args = [
            "train",
            "--auto",
            "off",
            "--keep",
            "off",
            "--skip-check",
            "-m",
            model,
            "-d",
            data_arg,
            "-o",
            out,
            "--steps",
            "5",
            "--batch",
            "2",
            "--threads",
            "1",
        ];
        [&args[..], &["--save-every", save_every], more].concat().into_iter().map(str::to_owned).collect()
    };
    let refs = |args: &[String]| -> Vec<&'static str> { args.iter().map(|a| &*a.clone().leak()).collect() };
    let weights = |out: &str| fs::read(Path::new(out).join("adapter_model.safetensors")).unwrap();

    fs::create_dir(path("home")).unwrap();
    let whole = path("whole");
    ok(&f, &refs(&train(&whole, "1", &[])));

    // Room for the adapter, but not for a checkpoint, which is six times as large: training goes on.
    let narrow = path("narrow");
    let blocks = weights(&whole).len() as u32 / 512 + 2;
    let done = run(&f, Some(blocks), &refs(&train(&narrow, "1", &[])));
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{stderr}");
    let refused = stderr.matches("checkpoint.safetensors`: could not write it").count();
    assert_eq!(refused, 4, "one for each step but the last: {stderr}");
    assert!(weights(&narrow) == weights(&whole));

    // The adapter's room is asked for first.
    for (save_every, file) in [("1", "adapter_model.safetensors"), ("0", "adapter_model.safetensors")] {
        // From nothing: nothing is left but the empty folder.
        let out = path(&format!("fresh-{save_every}"));
        fs::create_dir(&out).unwrap();
        unharmed(&f, 4, &refs(&train(&out, save_every, &[])), file).unwrap();

        // From a checkpoint: it stays, and carries the run to the same end.
        let out = path(&format!("resumed-{save_every}"));
        let every = save_every.parse().unwrap();
        let config = TrainConfig { steps: Some(5), batch: 2, save_every: every, ..TrainConfig::default() };
        let engine = open(&f.model).unwrap();
        let samples = engine.dataset(&data, 1024).unwrap();
        let mut trainer = engine.trainer(config, samples, None, None, Path::new(&out)).unwrap();
        assert!(!trainer.run(&mut StopAfter(2)).unwrap().done);
        drop(trainer);
        let resume = train(&out, save_every, &["--resume"]);
        for _ in 0..2 {
            unharmed(&f, 4, &refs(&resume), file).unwrap();
        }
        ok(&f, &refs(&resume));
        assert!(weights(&out) == weights(&whole), "{file}");

        // Over an older adapter: it stays, and is whole.
        let again = train(&out, save_every, &["--overwrite", "--rank", "2"]);
        unharmed(&f, 4, &refs(&again), file).unwrap();
        ok(&f, &["eval", "-m", model, "-a", &out, "-d", data_arg]);
        ok(&f, &refs(&again));
        ok(&f, &["eval", "-m", model, "-a", &out, "-d", data_arg]);
    }
}

#[test]
fn a_full_disk_in_quantization_costs_no_model() {
    let f = fixture();
    let path = |name: &str| f.dir.path().join(name).to_str().unwrap().to_owned();
    let (model, older) = (f.model.to_str().unwrap(), path("older"));
    fs::create_dir_all(path("home/quantized")).unwrap();
    ok(&f, &["quantize", model, "-o", &older, "--to", "f16"]);
    let fresh = path("fresh");
    // The limits strike the weights at their start and further on.
    let cases = [1, 16, 64].into_iter().flat_map(|blocks| [(blocks, &older), (blocks, &fresh)]);
    check_all(cases, |(blocks, out)| {
        unharmed(&f, *blocks, &["quantize", model, "-o", out, "--overwrite"], "model.safetensors")
    });
    // At first use, into the cache.
    let ask = ["generate", "-m", model, "-p", "a", "-n", "1"];
    unharmed(&f, 16, &ask, "model.safetensors").unwrap();
    ok(&f, &["generate", "-m", &older, "--no-quantize", "-p", "a", "-n", "1"]);
    ok(&f, &ask);
    ok(&f, &["quantize", model, "-o", &older, "--overwrite"]);
    ok(&f, &["generate", "-m", &older, "-p", "a", "-n", "1"]);
}

#[test]
fn a_full_disk_costs_no_file_of_logits() {
    let f = fixture();
    let [ids, out] = ["ids.json", "logits.safetensors"].map(|n| f.dir.path().join(n).to_str().unwrap().to_owned());
    fs::create_dir(f.dir.path().join("home")).unwrap();
    fs::write(&ids, format!("[{:?}, [7, 8, 9]]", vec![5; 100])).unwrap();
    let model = f.model.to_str().unwrap();
    let eval = ["eval", "-m", model, "--no-quantize", "--ids", &ids, "--save-logits", &out];
    unharmed(&f, 64, &eval, "logits.safetensors").unwrap();
    ok(&f, &eval);
    fs::write(&ids, format!("[{:?}]", vec![6; 100])).unwrap();
    unharmed(&f, 64, &eval, "logits.safetensors").unwrap();
    ok(&f, &eval);
}
