//! The model cache as people meet it: what is made at first use follows the model, is shared, listed and removed.

use crate::common::{check_all, golden, tiny_chat_model, tiny_chats};
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, SystemTime};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

struct Cache {
    dir: tempfile::TempDir,
    model: PathBuf,
}

impl Cache {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = tiny_chat_model(dir.path());
        Self { dir, model }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn model(&self) -> &str {
        self.model.to_str().unwrap()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pocketlora"));
        command.args(args).stdin(Stdio::null()).current_dir(self.dir.path());
        command.env("POCKETLORA_HOME", self.path("home")).env_remove("POCKETLORA_CACHE_LIMIT");
        command.env("HF_HUB_CACHE", self.path("hub")).env("HF_HUB_OFFLINE", "1");
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> (String, String) {
        let out = self.run(args);
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let stderr = text(out.stderr);
        assert!(out.status.success(), "{args:?}: {stderr}");
        (text(out.stdout), stderr)
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(self.ok(args).0.lines().last().unwrap()).unwrap()
    }

    /// Uses the model, and so its copy.
    fn prompt_tokens(&self, model: &str) -> u64 {
        self.json(&["generate", "-m", model, "--chat", "-p", "hi", "-n", "1", "--json"])["prompt_tokens"]
            .as_u64()
            .unwrap()
    }

    fn copies(&self) -> Vec<PathBuf> {
        let list = fs::read_dir(self.path("home/quantized")).unwrap().map(|e| e.unwrap().path());
        let mut copies: Vec<_> = list.filter(|p| p.is_dir()).collect();
        copies.sort();
        copies
    }

    fn items(&self) -> Vec<Value> {
        self.json(&["list", "--json"])["items"].as_array().unwrap().clone()
    }

    /// What another program fetched from the hub as `owner/NAME`, pulled.
    fn pull(&self, name: &str, from: &Path) -> String {
        let repository = self.dir.path().join(format!("hub/models--owner--{name}"));
        let snapshot = repository.join("snapshots").join(COMMIT);
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(repository.join("refs")).unwrap();
        fs::write(repository.join("refs/main"), COMMIT).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, snapshot.join(path.file_name().unwrap())).unwrap();
        }
        let name = format!("owner/{name}");
        self.ok(&["pull", &name]);
        name
    }
}

/// Changes a file's text.
fn edit(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from} in {}", path.display());
    fs::write(path, text.replace(from, to)).unwrap();
}

#[cfg(unix)]
fn inode(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap())
}

#[test]
fn an_edit_of_the_model_counts_at_once() {
    let c = Cache::new();
    let before = c.prompt_tokens(c.model());
    let first = c.copies();
    #[cfg(unix)]
    let weights = inode(&first[0].join("model.safetensors"));

    // Texts cost no new weights, and the copy that had the old ones is not kept.
    edit(&c.model.join("tokenizer_config.json"), "<|im_end|>\\n", "<|im_end|>\\n\\n");
    assert_eq!(c.prompt_tokens(c.model()), before + 1);
    let second = c.copies();
    assert!(second.len() == 1 && second != first, "{second:?}");
    #[cfg(unix)]
    assert_eq!(inode(&second[0].join("model.safetensors")), weights);
    edit(&c.model.join("tokenizer_config.json"), "<|im_end|>\\n\\n", "<|im_end|>\\n");
    assert_eq!(c.prompt_tokens(c.model()), before);

    // Another config means other weights; the old copy is offered for removal.
    edit(&c.model.join("config.json"), "\"rope_theta\": ", "\"rope_theta\": 1");
    let (_, said) = c.ok(&["generate", "-m", c.model(), "-p", "hi", "-n", "1"]);
    assert!(said.contains("pocketlora remove --stale"), "{said}");
    assert_eq!(c.copies().len(), 2);
    let stale = |items: &[Value]| items.iter().filter(|i| !i["stale"].is_null()).count();
    assert_eq!(stale(&c.items()), 1);
    let removed = c.json(&["remove", "--stale", "--json"]);
    assert!(
        removed["freed"].as_u64().unwrap() > 10_000 && removed["removed"].as_array().unwrap().len() == 1,
        "{removed}"
    );
    assert_eq!((c.copies().len(), stale(&c.items())), (1, 0));

    // A model that is gone leaves a copy that is listed as such.
    fs::rename(&c.model, c.path("elsewhere")).unwrap();
    assert_eq!(c.items()[0]["stale"], "its model is gone");
    assert_eq!(c.json(&["list", "--json"])["stale_bytes"], c.items()[0]["bytes"]);
}

#[test]
fn adapters_name_their_base_as_it_was_named() {
    let c = Cache::new();
    let data = tiny_chats(c.dir.path(), 2);
    let pulled = c.pull("tiny", &c.model);
    let nf4 = c.path("nf4");
    c.ok(&["quantize", c.model(), "-o", &nf4]);
    let pulled_nf4 = c.pull("tiny-nf4", Path::new(&nf4));
    let weights = c.path("tiny-chat/model.safetensors");
    check_all(
        [
            (pulled.as_str(), &[][..], pulled.as_str()),
            (&pulled, &["--no-quantize"], &pulled),
            (&pulled_nf4, &[], &pulled_nf4),
            (c.model(), &[], c.model()),
            (&nf4, &[], &nf4),
            ("tiny-chat", &[], "tiny-chat"),
            (&weights, &[], c.model()),
        ],
        |(model, flags, name)| {
            let out = c.path("adapter");
            let args = [
                "train",
                "--auto",
                "off",
                "-m",
                model,
                "-d",
                data.to_str().unwrap(),
                "-o",
                &out,
                "--steps",
                "1",
                "--overwrite",
            ];
            c.ok(&[&args[..], flags].concat());
            let text = fs::read_to_string(Path::new(&out).join("adapter_config.json")).unwrap();
            let got = &serde_json::from_str::<Value>(&text).unwrap()["base_model_name_or_path"];
            if got == name { Ok(()) } else { Err(format!("{model} {flags:?}: {got} instead of {name}")) }
        },
    );
    // An adapter that goes on keeps its base's name, but for one that is a copy's in the cache.
    for (base, kept) in [("owner/tiny", "owner/tiny"), ("tiny-nf4-0123456789abcdef", c.model())] {
        let (first, out) = (c.path("adapter"), c.path("next"));
        let path = Path::new(&first).join("adapter_config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["base_model_name_or_path"] = base.into();
        fs::write(&path, config.to_string()).unwrap();
        let args = [
            "train",
            "--auto",
            "off",
            "-m",
            c.model(),
            "-d",
            data.to_str().unwrap(),
            "--init",
            &first,
            "-o",
            &out,
            "--overwrite",
        ];
        c.ok(&[&args[..], &["--steps", "1"]].concat());
        assert_eq!(c.json(&["info", &out, "--json"])["base"], *kept, "{base}");
    }
    let origin = fs::read_to_string(
        c.items()
            .iter()
            .find(|i| i["name"] == *pulled && i["kind"] == "quantized")
            .map(|i| Path::new(i["path"].as_str().unwrap()).join("pocketlora_source.json"))
            .unwrap(),
    );
    let origin: Value = serde_json::from_str(&origin.unwrap()).unwrap();
    assert_eq!((&origin["name"], &origin["revision"]), (&pulled.into(), &COMMIT.into()));
}

#[test]
fn the_list_tells_families_and_the_adapters_of_each_model() {
    let c = Cache::new();
    let (name, other) = (c.pull("tiny", &c.model), c.pull("other", &c.model));
    let data = tiny_chats(c.dir.path(), 4);
    let out = c.path("trained here");
    let train = ["train", "--auto", "off", "-m", &name, "-d", data.to_str().unwrap(), "-o", &out, "--steps", "1"];
    c.ok(&train);
    let of = |name: &str| c.items().into_iter().find(|item| item["kind"] == "model" && item["name"] == name).unwrap();
    assert_eq!(of(&name)["family"], "llama");
    let full = Path::new(&out).canonicalize().unwrap();
    assert_eq!(of(&name)["adapters"], serde_json::json!([full]));
    assert_eq!(of(&other)["adapters"], serde_json::json!([]));
    let copy = c.items().into_iter().find(|item| item["kind"] == "quantized").unwrap();
    assert_eq!((&copy["family"], &copy["adapters"]), (&"llama".into(), &serde_json::json!([])));
    let said = c.ok(&["list"]).0;
    assert!(said.contains("family") && said.contains("trained on it") && said.contains("trained here"), "{said}");
    assert!(c.ok(&["pull", "--list"]).0.contains("smollm2-135m"));
    // One that is gone is no longer told of; one that moved is found no more.
    fs::remove_dir_all(&out).unwrap();
    assert_eq!(of(&name)["adapters"], serde_json::json!([]));
    c.ok(&["remove", &name]);
    assert!(!c.items().iter().any(|item| item["name"] == name) && c.run(&["remove", &name]).status.code() == Some(1));
}

#[test]
fn programs_that_start_together_make_one_copy() {
    let c = Cache::new();
    let args = ["generate", "-m", c.model(), "-p", "hi", "-n", "1"];
    let start = || c.command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let running: Vec<_> = (0..4).map(|_| start()).collect();
    for child in running {
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    let copies = c.copies();
    assert_eq!(copies.len(), 1, "{copies:?}");

    // Somebody is at work on it, for as long as we hold the lock.
    let name = copies[0].file_name().unwrap().to_str().unwrap();
    let lock = File::options().write(true).open(copies[0].with_file_name(format!(".{name}.lock"))).unwrap();
    lock.try_lock().unwrap();
    fs::remove_dir_all(&copies[0]).unwrap();
    let mut waiting = start();
    thread::sleep(Duration::from_secs(1));
    assert!(waiting.try_wait().unwrap().is_none(), "it waits");
    assert!(c.copies().is_empty());
    drop(lock);
    let out = waiting.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && said.matches("waiting for it").count() == 1, "{said}");
    assert_eq!(c.copies(), copies);
}

#[test]
fn a_killed_first_use_blocks_nobody_and_its_rest_goes() {
    let c = Cache::new();
    let args = ["generate", "-m", c.model(), "-p", "hi", "-n", "1"];
    for wait in [0, 5, 10, 20, 40] {
        let mut child = c.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_millis(wait));
        let _ = child.kill();
        child.wait().unwrap();
    }
    c.ok(&args);
    let copy = c.copies().into_iter().find(|p| !p.file_name().unwrap().to_str().unwrap().starts_with('.')).unwrap();
    let name = copy.file_name().unwrap().to_str().unwrap();
    let rest = copy.with_file_name(format!(".{name}.tmp-Ab1"));
    fs::create_dir_all(&rest).unwrap();
    fs::write(rest.join("model.safetensors"), "half").unwrap();
    assert!(c.items().iter().any(|i| i["kind"] == "leftover" && i["stale"].is_string()));
    fs::remove_dir_all(&copy).unwrap();
    c.ok(&args);
    assert_eq!(c.copies(), [copy]);
}

#[cfg(unix)]
#[test]
fn what_a_running_program_uses_stays() {
    let c = Cache::new();
    let mut chat = c.command(&["chat", "-m", c.model()]);
    let mut chat = chat.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let whole = || {
        let list = fs::read_dir(c.path("home/quantized")).into_iter().flatten().flatten();
        let mut names = list.map(|e| e.file_name().into_string().unwrap());
        names.any(|name| name.starts_with("tiny-chat"))
    };
    while !whole() {
        thread::sleep(Duration::from_millis(20));
    }
    let out = c.run(&["remove", c.model()]);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("in use"), "{out:?}");
    assert!(whole());
    drop(chat.stdin.take());
    chat.wait().unwrap();
    c.ok(&["remove", c.model()]);
    assert!(!whole() && c.model.join("config.json").exists());
}

#[test]
fn a_model_goes_with_what_was_made_from_it_and_nothing_else_does() {
    let c = Cache::new();
    let (tiny, other) = (c.pull("tiny", &c.model), c.pull("other", &c.model));
    let lora = c.pull("lora", &golden("adapters/lora"));
    for name in [&tiny, &other] {
        c.prompt_tokens(name);
    }
    let kinds = |c: &Cache| -> Vec<String> {
        c.items().iter().map(|i| format!("{} {}", i["kind"].as_str().unwrap(), i["name"].as_str().unwrap())).collect()
    };
    let all = [
        "model owner/other",
        "model owner/tiny",
        "adapter owner/lora",
        "quantized owner/other",
        "quantized owner/tiny",
    ];
    assert_eq!(kinds(&c), all);
    let (listed, _) = c.ok(&["list"]);
    let (pulled, _) = c.ok(&["pull", "--list"]);
    for name in [&tiny, &other, &lora] {
        assert!(listed.contains(name.as_str()) && pulled.contains(name.as_str()), "{listed}{pulled}");
    }
    let shared = c.dir.path().join("hub/models--owner--tiny/snapshots");
    let (_, said) = c.ok(&["remove", &tiny]);
    assert!(said.contains("--downloads") && shared.exists(), "{said}");
    assert_eq!(kinds(&c), ["model owner/other", "adapter owner/lora", "quantized owner/other"]);
    c.ok(&["pull", &tiny]);
    c.ok(&["remove", &tiny, "--downloads"]);
    assert!(!shared.exists());

    // Nothing outside, by whatever way.
    fs::write(c.path("precious"), "mine").unwrap();
    let copy = c.copies()[0].to_str().unwrap().to_owned();
    let outside = [
        c.path("precious"),
        c.path(""),
        "..".to_owned(),
        format!("{copy}/config.json"),
        c.path("home"),
        "nothing".into(),
    ];
    for what in outside.iter().map(String::as_str).chain(["home/models", "hub/models--owner--other", ""]) {
        let out = c.run(&["remove", what]);
        assert!(
            !out.status.success() && String::from_utf8_lossy(&out.stderr).contains("pocketlora list"),
            "{what}: {out:?}"
        );
    }
    assert_eq!(kinds(&c), ["model owner/other", "adapter owner/lora", "quantized owner/other"]);
    // A path in the cache, and its folder's name.
    c.ok(&["remove", &copy, &lora]);
    assert_eq!(kinds(&c), ["model owner/other"]);
    assert_eq!(c.run(&["remove"]).status.code(), Some(2));
}

#[test]
fn the_limit_takes_the_longest_unused_copies_and_never_what_was_pulled() {
    let c = Cache::new();
    let models: Vec<String> = ["one", "two", "three"].map(|name| c.pull(name, &c.model)).to_vec();
    for name in &models[..2] {
        c.prompt_tokens(name);
    }
    // The first was used last.
    let long_ago = SystemTime::now() - Duration::from_secs(9999);
    let copy = c.items().iter().find(|i| i["kind"] == "quantized" && i["name"] == *models[1]).unwrap()["path"].clone();
    let record = Path::new(copy.as_str().unwrap()).join("pocketlora_source.json");
    File::options().append(true).open(record).unwrap().set_modified(long_ago).unwrap();
    let now = c.json(&["list", "--json"])["bytes"].as_u64().unwrap();
    let with = |limit: &str, model: &str| {
        let mut command = c.command(&["generate", "-m", model, "-p", "hi", "-n", "1"]);
        let out = command.env("POCKETLORA_CACHE_LIMIT", limit).output().unwrap();
        (out.status.success(), String::from_utf8(out.stderr).unwrap())
    };
    let (done, said) = with(&(now + 10_000).to_string(), &models[2]);
    assert!(done && said.contains("removed the copy of owner/two") && !said.contains("owner/one"), "{said}");
    let left = |kind: &str| {
        let items = c.items().into_iter().filter(|i| i["kind"] == kind);
        items.map(|i| i["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!((left("quantized"), left("model").len()), (vec!["owner/one".to_owned(), "owner/three".to_owned()], 3));
    let (done, said) = with("1kB", &models[1]);
    assert!(done && said.contains("over its limit of"), "{said}");
    assert_eq!((left("quantized"), left("model").len()), (vec!["owner/two".to_owned()], 3));
    let (done, said) = with("much", &models[1]);
    assert!(!done && said.contains("POCKETLORA_CACHE_LIMIT") && said.contains("much"), "{said}");
}

#[test]
fn names_and_paths_are_what_they_were_typed_as() {
    let c = Cache::new();
    let (adapter, data) = (golden("adapters/lora"), tiny_chats(c.dir.path(), 2));
    let lora = c.pull("lora", &adapter);
    let plain = ["generate", "-m", c.model(), "-p", "hi", "-n", "1", "--json"];
    let copy = |to: &str| {
        let to = c.dir.path().join(to);
        fs::create_dir_all(&to).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(adapter.join(file), to.join(file)).unwrap();
        }
    };
    ["runs/lr=1e-4", "runs/r", "runs/r=2", "mit Leerzeichen/é=", "-dash"].iter().for_each(|name| copy(name));
    // Each is found as an adapter, for generation, as a start, and by `info`.
    for name in [lora.as_str(), "runs/lr=1e-4", "runs/r=2", "mit Leerzeichen/é=", "./-dash"] {
        c.ok(&[&plain[..], &["-a", name]].concat());
        c.ok(&[&plain[..], &["-a", &format!("{name}=0.5")]].concat());
        assert_eq!(c.json(&["info", name, "--json"])["method"], "lora", "{name}");
        let out = c.path("out dir=1");
        let train = [
            "train",
            "--auto",
            "off",
            "-m",
            c.model(),
            "-d",
            data.to_str().unwrap(),
            "--steps",
            "1",
            "--overwrite",
            "-o",
            &out,
        ];
        c.ok(&[&train[..], &["--init", name]].concat());
    }
    let (_, said) = c.ok(&[&plain[..], &["-a", "runs/r=2"]].concat());
    assert!(said.contains("taken as the folder of that name"), "{said}");
    c.ok(&[&plain[..], &["-a=-dash"]].concat());

    // A folder wins over a name in the cache, and it is said.
    let tiny = c.pull("tiny", &c.model);
    fs::create_dir_all(c.path("owner")).unwrap();
    fs::rename(&c.model, c.path("owner/tiny")).unwrap();
    let (_, said) = c.ok(&["info", &tiny]);
    assert!(said.contains("taken as the path of that name"), "{said}");

    // The home folder, where the shell leaves the tilde.
    let at_home = |args: &[&str]| c.command(args).env("HOME", c.dir.path()).output().unwrap();
    if cfg!(unix) {
        for args in [["info", "~/runs/r"], ["info", "~/owner/tiny"]] {
            let out = at_home(&args);
            assert!(out.status.success(), "{args:?}: {out:?}");
        }
        let out = at_home(&["generate", "-m=~/owner/tiny", "-a=~/runs/r=2", "-p", "hi", "-n", "1"]);
        assert!(out.status.success(), "{out:?}");
        let out = at_home(&["quantize", &tiny, "-o=~/made here"]);
        assert!(out.status.success() && Path::new(&c.path("made here/config.json")).exists(), "{out:?}");
    }

    let wrong = |args: &[&str], says: &[&str]| {
        let out = c.run(args);
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(!out.status.success() && says.iter().all(|s| said.contains(s)), "{args:?}: {said}");
    };
    let generate = ["generate", "-m", &tiny, "-p", "hi"];
    wrong(&[&generate[..], &["-a", "nowhere"]].concat(), &["`nowhere`", "adapter_config.json", "pocketlora list"]);
    wrong(&[&generate[..], &["-a", "no/where=2"]].concat(), &["`no/where=2` or `no/where`", "pocketlora pull"]);
    wrong(&[&generate[..], &["-a", "runs/r=much"]].concat(), &["finite number", "`much`"]);
    wrong(&["generate", "-m", &lora, "-p", "hi"], &["got an adapter", "-a owner/lora"]);
}

#[test]
fn quantize_replaces_nothing_unless_asked() {
    let c = Cache::new();
    let f32 = c.path("f32");
    c.ok(&["quantize", c.model(), "-o", &f32, "--to", "f32"]);
    let weights = fs::read(Path::new(&f32).join("model.safetensors")).unwrap();
    let older = c.path("older");
    c.ok(&["quantize", &f32, "-o", &older]);
    for (out, flags, says) in [
        (f32.as_str(), &[][..], "apart from the source"),
        (&f32, &["--overwrite"], "apart from the source"),
        (&older, &[], "`--overwrite`"),
        (c.model(), &["--overwrite"], "did not write"),
    ] {
        let done = c.run(&[&["quantize", &f32, "-o", out], flags].concat());
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(!done.status.success() && said.contains(says), "{out} {flags:?}: {said}");
    }
    c.ok(&["quantize", &f32, "-o", &older, "--to", "bf16", "--overwrite"]);
    assert!(fs::read(Path::new(&f32).join("model.safetensors")).unwrap() == weights);
}

#[cfg(unix)]
#[test]
fn what_use_it_says_can_be_pasted() {
    let c = Cache::new();
    let data = tiny_chats(c.dir.path(), 2);
    let model = "it's my model";
    fs::rename(&c.model, c.path(model)).unwrap();
    let train =
        ["train", "--auto", "off", "-m", model, "-d", data.to_str().unwrap(), "-o", "my runs/$one", "--steps", "1"];
    let outputs = [c.ok(&train).1, c.ok(&["quantize", model, "-o", "my nf4"]).1];
    let programs = Path::new(env!("CARGO_BIN_EXE_pocketlora")).parent().unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    for said in outputs {
        let line = said.lines().find_map(|l| l.strip_prefix("use it: ")).unwrap_or_else(|| panic!("{said}"));
        let mut shell = Command::new("sh");
        shell.args(["-c", line]).env("PATH", &path).env("POCKETLORA_HOME", c.path("home")).current_dir(c.dir.path());
        let out = shell.stdin(Stdio::null()).output().unwrap();
        assert!(out.status.success() && !line.contains("home/"), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    }
}

#[test]
fn eval_replaces_its_own_files_and_no_other() {
    let c = Cache::new();
    let (data, ids, answers, logits) =
        (c.path("data.jsonl"), c.path("ids.json"), c.path("a.jsonl"), c.path("l.safetensors"));
    fs::write(&data, "{\"prompt\": \"q\", \"reference\": \"a\"}\n").unwrap();
    fs::write(&ids, "[[1, 2, 3]]").unwrap();
    let ask = |out: &str| c.run(&["eval", "-m", c.model(), "-d", &data, "-n", "1", "--answers", out]);
    let score = |out: &str| c.run(&["eval", "-m", c.model(), "--ids", &ids, "--save-logits", out]);
    for _ in 0..2 {
        assert!(ask(&answers).status.success() && score(&logits).status.success());
    }
    let weights = c.path("tiny-chat/model.safetensors");
    let before = [&data, &ids, &weights].map(|path| fs::read(path).unwrap());
    for (done, says) in [
        (ask(&data), "what the command reads"),
        (ask(&ids), "another kind"),
        (score(&ids), "what the command reads"),
        (score(&weights), "another kind"),
        (score(&answers), "another kind"),
        (ask(c.model()), "a folder"),
    ] {
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(!done.status.success() && said.contains(says), "{says}: {said}");
    }
    assert!(before == [&data, &ids, &weights].map(|path| fs::read(path).unwrap()));
}

/// Disks fill, and people tidy up: a copy that is not whole any more is seen, and made again.
#[test]
fn a_damaged_copy_is_made_again() {
    let c = Cache::new();
    let tokens = c.prompt_tokens(c.model());
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 4] = [
        ("cut weights", |copy| {
            File::options().write(true).open(copy.join("model.safetensors")).unwrap().set_len(500).unwrap()
        }),
        ("no record", |copy| fs::remove_file(copy.join("pocketlora_source.json")).unwrap()),
        ("no tokenizer", |copy| fs::remove_file(copy.join("tokenizer.json")).unwrap()),
        ("no config", |copy| fs::remove_file(copy.join("config.json")).unwrap()),
    ];
    for (name, damage) in damages {
        let copy = c.copies().remove(0);
        damage(&copy);
        let stale = c.items().iter().any(|item| item["stale"].as_str().is_some_and(|why| why.contains("damaged")));
        assert!(stale, "{name}: {:?}", c.items());
        assert_eq!(c.prompt_tokens(c.model()), tokens, "{name}");
        assert_eq!(c.copies(), [copy], "{name}");
    }
}

/// A folder without a name of ours is not ours to take away.
#[test]
fn a_foreign_folder_in_the_cache_stays() {
    let c = Cache::new();
    c.prompt_tokens(c.model());
    let own =
        ["quantized/mine", "quantized/my-nf4-model", "int8/mine"].map(|name| PathBuf::from(c.path("home")).join(name));
    for folder in &own {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("notes.txt"), "mine").unwrap();
    }
    c.ok(&["remove", "--stale"]);
    own.iter().for_each(|folder| assert!(folder.join("notes.txt").exists(), "{}", folder.display()));
}
