//! How a LoRA begins and which course a run takes, as flags: a run that is killed in the middle and resumed ends in the same
//! bytes, whatever of it was computed or drawn before.

use crate::common::{check_all, convert};
use crate::fixture::{Fixture, fixture};
use pocketlora::format::Target;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::Stdio;

/// Steps of a run, and after how many it is killed.
const STEPS: &str = "40";
const KILLED: usize = 7;
/// How often it is tried: on a busy machine a run may be over before it is killed.
const TRIES: usize = 10;

/// Kills the run `args` without warning after some steps.
fn kill(f: &Fixture, args: &[&str]) {
    let mut child = f.command(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.by_ref().take(KILLED).for_each(|line| drop(line.unwrap()));
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Runs `flags` whole, then killed and resumed, and compares what is left.
fn killed_and_whole_end_alike(f: &Fixture, model: &str, name: &str, flags: &[&str]) -> Result<(), String> {
    let data = f.data.to_str().unwrap();
    let [whole, cut] = ["whole", "cut"].map(|kind| f.path(&format!("{name}-{kind}")));
    let args = |out: &'_ str| -> Vec<String> {
        let own = ["train", "--auto", "off", "--skip-check", "--keep", "off", "-m", model, "-d", data, "-o", out];
        let more = [
            "--steps",
            STEPS,
            "--batch",
            "2",
            "--rank",
            "4",
            "--lr",
            "3e-3",
            "--save-every",
            "1",
            "--json",
            "--threads",
            "1",
        ];
        own.iter().chain(&more).chain(flags).map(|arg| (*arg).to_owned()).collect()
    };
    let run = |args: &[String]| {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let out = f.run(&args);
        out.status.success().then_some(()).ok_or_else(|| format!("{name}: {}", String::from_utf8_lossy(&out.stderr)))
    };
    run(&args(&whole))?;
    let cut_args = args(&cut);
    let mut left = TRIES;
    while !Path::new(&cut).join("checkpoint.safetensors").exists() {
        if left == 0 {
            return Err(format!("{name}: nothing to resume"));
        }
        left -= 1;
        let _ = fs::remove_dir_all(&cut);
        kill(f, &cut_args.iter().map(String::as_str).collect::<Vec<_>>());
    }
    let resumed: Vec<String> =
        ["train", "-m", model, "-d", data, "-o", &cut, "--resume", "--skip-check"].map(str::to_owned).to_vec();
    run(&resumed)?;
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        let [a, b] = [&whole, &cut].map(|out| fs::read(Path::new(out).join(file)).unwrap());
        if a != b {
            return Err(format!("{name}: {file} differs"));
        }
    }
    Ok(())
}

#[test]
fn whatever_a_run_began_with_it_is_resumed_to_the_same_bytes() {
    let f = fixture();
    let (source, nf4) = (f.model.to_str().unwrap(), f.path("nf4"));
    convert(&f.model, Path::new(&nf4), Target::Nf4);
    let cases: [(&str, &[&str]); 9] = [
        ("gaussian", &["--init-lora-weights", "gaussian"]),
        ("orthogonal", &["--init-lora-weights", "orthogonal"]),
        ("pissa", &["--init-lora-weights", "pissa"]),
        ("olora", &["--init-lora-weights", "olora"]),
        ("milora", &["--init-lora-weights", "milora"]),
        ("loftq", &["--init-lora-weights", "loftq", "--loftq-source", source]),
        ("eva", &["--init-lora-weights", "eva", "--init-steps", "2"]),
        ("corda", &["--init-lora-weights", "corda", "--init-steps", "2"]),
        ("lora_ga", &["--init-lora-weights", "lora_ga", "--init-steps", "2"]),
    ];
    check_all(cases, |(name, flags)| killed_and_whole_end_alike(&f, &nf4, name, flags));
}

#[test]
fn whatever_course_a_run_takes_it_is_resumed_to_the_same_bytes() {
    let f = fixture();
    let model = f.path("nf4");
    convert(&f.model, Path::new(&model), Target::Nf4);
    let cases: [(&str, &[&str]); 8] = [
        ("relora", &["--relora", "5", "--relora-prune", "0.9", "--relora-warmup", "2"]),
        ("layers", &["--layers-at-once", "1", "--layers-every", "3"]),
        ("rotate", &["--layers-at-once", "1", "--layers-every", "2", "--layers-order", "rotate"]),
        ("dropbp", &["--dropbp", "0.3"]),
        ("rank-dropout", &["--dropout", "0.2", "--dropout-form", "rank"]),
        ("riemannian", &["--riemannian"]),
        ("sam", &["--sam", "0.05"]),
        (
            "growing",
            &[
                "--method",
                "adalora",
                "--grow-ranks",
                "--option",
                "target_r=2",
                "--option",
                "tinit=2",
                "--option",
                "tfinal=5",
            ],
        ),
    ];
    check_all(cases, |(name, flags)| killed_and_whole_end_alike(&f, &model, name, flags));
}

#[test]
fn flags_of_courses_that_do_nothing_are_refused_by_name() {
    let f = fixture();
    let cases: [(&[&str], &str); 10] = [
        (&["--sam", "1e30"], "`sam`: expected a distance above 0, up to 100"),
        (&["--layers-at-once", "3"], "`layers-at-once`: expected at most 2"),
        (&["--method", "bottleneck", "--option", "scaling=0"], "scaling"),
        (&["--option", "scaling=2"], "a method that has `scaling`"),
        (&["--method", "adalora", "--grow-ranks", "--option", "target_r=9"], "is below `rank`"),
        (&["--budget-mb", "0.0001"], "`budget-mb`: expected at least"),
        (&["--budget-parameters", "3"], "`budget-parameters`: expected at least"),
        (&["--method", "prefix-tuning", "--num-virtual-tokens", "60000"], "`num-virtual-tokens`"),
        (&["--init-lora-weights", "loftq"], "`loftq-source`"),
        (&["--init-steps", "3"], "`init-steps`"),
    ];
    check_all(cases, |(flags, says)| {
        let out = f.path("none");
        let said = f.said(&[&f.train_args(&out)[..], flags].concat());
        let written = Path::new(&out).join("adapter_config.json").exists();
        if said.contains(says) && !written { Ok(()) } else { Err(format!("{flags:?}: {said}")) }
    });
}
