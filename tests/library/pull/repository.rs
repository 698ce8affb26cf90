//! The hub as a source.

use super::server::{COMMIT, Served, Server, large, small, start};
use super::{quietly, unfinished};
use pocketlora::ErrorCode;
use pocketlora::hub::{Event, Hub, Stage};
use std::fs;
use std::net::TcpListener;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const NAME: &str = "maker/model";

fn weights() -> Vec<u8> {
    (0..300_000u32).flat_map(u32::to_le_bytes).collect()
}

fn files() -> Vec<Served> {
    vec![
        small("config.json", "{}"),
        small("tokenizer.json", "{\"a\": 1}"),
        large("model.safetensors", weights()),
        large("consolidated.safetensors", weights()),
        small("pytorch_model.bin", "a pickle"),
        small("modeling.py", "code"),
        small("additional_chat_templates/tool_use.jinja", "{{ tools }}"),
        small("additional_chat_templates/../../evil.jinja", "outside"),
        small("onnx/model.safetensors", "elsewhere"),
        small("../evil.safetensors", "outside"),
    ]
}

fn setup() -> (TempDir, Server, Hub) {
    let (home, server) = (tempfile::tempdir().unwrap(), start(files()));
    let mut hub = Hub::at(home.path());
    hub.endpoint = Some(server.endpoint.clone());
    (home, server, hub)
}

#[test]
fn weights_of_a_model_that_cannot_run_are_not_fetched() {
    let (_home, server, hub) = setup();
    for (config, word) in [
        (r#"{"model_type": "bloom"}"#, "`mistral`"),
        (
            r#"{"model_type": "llama", "quantization_config": {"quant_method": "compressed-tensors"}}"#,
            "compressed-tensors",
        ),
    ] {
        server.state.lock().unwrap().files[0] = small("config.json", config);
        let error = quietly(&hub, NAME).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Unsupported, "{error}");
        assert!(error.to_string().contains(word) && error.place().contains("maker/model/config.json"), "{error}");
        fs::remove_dir_all(&hub.hub_cache).unwrap();
    }
    let log = format!("{:?}", server.state.lock().unwrap().log);
    assert!(!log.contains("safetensors"), "{log}");
}

#[test]
fn a_repository_arrives_without_what_could_run_code() {
    let (home, server, hub) = setup();
    let mut licences = Vec::new();
    let mut most = 0;
    let mut watch = |event: Event<'_>| {
        match event {
            Event::Licence { licence, .. } => licences.push(licence.to_owned()),
            Event::Progress { stage: Stage::Check, done, .. } => most = most.max(done),
            _ => {}
        }
        ControlFlow::Continue(())
    };
    let path = hub.pull(NAME, &mut watch).unwrap();
    let mut names: Vec<_> =
        fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(fs::read_dir(path.join(names.remove(0))).unwrap().count(), 1, "one further template");
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read(path.join("model.safetensors")).unwrap(), weights());
    assert_eq!(hub.resolve(NAME), Some(path.clone()));
    let cached = hub.list_cached().unwrap();
    assert_eq!((cached.len(), cached[0].name.as_str(), cached[0].licence.as_str()), (1, NAME, "mit"));

    let asked = server.state.lock().unwrap().log.len();
    assert_eq!(hub.pull(NAME, &mut watch).unwrap(), path);
    assert_eq!(server.state.lock().unwrap().log.len(), asked, "a second pull needs no network");
    assert_eq!(licences.last().unwrap(), "mit");
    assert_eq!(most, weights().len() as u64);
    assert!(unfinished(&home.path().join("models/maker--model")).is_empty());
}

#[test]
fn a_broken_connection_is_resumed() {
    let (_home, server, hub) = setup();
    server.state.lock().unwrap().files.remove(0);
    server.state.lock().unwrap().files.insert(0, large("config.json", b"{ }".to_vec()));
    server.state.lock().unwrap().cut = 2;
    let path = quietly(&hub, NAME).unwrap();
    assert_eq!(fs::read(path.join("model.safetensors")).unwrap(), weights());
    let log = server.state.lock().unwrap().log.join("\n");
    assert!(log.contains("config.json Some((1, None))"), "expected a resumed request in\n{log}");
}

#[test]
fn a_part_file_as_long_as_the_file_does_not_block_for_ever() {
    let (_home, _server, hub) = setup();
    let model = large("model.safetensors", weights());
    let blobs = hub.hub_cache.join("models--maker--model/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(model.etag).with_extension("part"), weights()).unwrap();
    let path = quietly(&hub, NAME).unwrap();
    assert_eq!(fs::read(path.join("model.safetensors")).unwrap(), weights());
}

#[test]
fn a_wrong_checksum_leaves_nothing() {
    let (_home, server, hub) = setup();
    server.state.lock().unwrap().files[2].bytes[1000] ^= 1;
    let error = quietly(&hub, NAME).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Network);
    assert!(error.to_string().contains("expected sha256"), "{error}");
    assert_eq!(hub.resolve(NAME), None);
    let snapshot = hub.hub_cache.join("models--maker--model/snapshots").join(COMMIT);
    assert!(!snapshot.join("model.safetensors").exists());
    server.state.lock().unwrap().files[2].bytes[1000] ^= 1;
    quietly(&hub, NAME).unwrap();
}

#[test]
fn refusals_say_what_to_do() {
    let cases: [(&str, &str, &str); 4] = [
        ("other/model", "", "check the name"),
        (NAME, "../../../elsewhere", "expected a commit hash"),
        (NAME, "model.safetensors", "has no `*.safetensors`"),
        (NAME, "config.json", "has no `config.json`"),
    ];
    for (name, spoil, expected) in cases {
        let (home, server, hub) = setup();
        if spoil.contains("..") {
            server.state.lock().unwrap().commit = spoil.into();
        } else {
            let ending = spoil.rsplit('.').next().filter(|e| *e == "safetensors");
            let spoilt = |f: &Served| f.name == spoil || ending.is_some_and(|e| f.name.ends_with(e));
            server.state.lock().unwrap().files.retain(|f| !spoilt(f));
        }
        let error = quietly(&hub, name).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Network, "{spoil}");
        assert!(error.to_string().contains(expected), "{spoil}: {error}");
        assert!(!home.path().join("elsewhere").exists());
    }
}

/// The hub sends large files on to another host, which has no business with the token.
#[test]
fn redirects_are_followed_and_the_token_stays_with_the_hub() {
    for other_host in [false, true] {
        let (_home, server, mut hub) = setup();
        hub.token = Some("secret".to_owned());
        let store = start(files());
        let moved = format!("{}/moved", store.endpoint.replace("127.0.0.1", "localhost"));
        {
            let mut state = server.state.lock().unwrap();
            state.elsewhere = Some(if other_host { moved } else { "/moved".to_owned() });
            state.gate = Some(("secret".to_owned(), 401));
        }
        let path = quietly(&hub, NAME).unwrap();
        assert_eq!(fs::read(path.join("model.safetensors")).unwrap(), weights());
        let (at_home, there) = (server.state.lock().unwrap(), store.state.lock().unwrap());
        assert!(at_home.tokens.iter().all(|token| token.as_deref() == Some("Bearer secret")), "{:?}", at_home.tokens);
        assert_eq!(there.log.iter().any(|request| request.contains("model.safetensors")), other_host);
        assert!(there.tokens.iter().all(Option::is_none), "{:?}", there.tokens);
    }
}

/// `OWNER/REPO[:FILE.gguf][@REVISION]`: one file, one revision, each beside the others in the cache.
#[test]
fn one_file_or_another_revision_arrives() {
    let (home, server, mut hub) = setup();
    let part = |n: u32| format!("big/model-0000{n}-of-00002.gguf");
    for file in
        [large("model-Q4_0.gguf", weights()), large(&part(1), weights()), large(&part(2), weights()[4..].to_vec())]
    {
        server.state.lock().unwrap().files.push(file);
    }
    let mut found = Vec::new();
    for name in [
        "maker/model".to_owned(),
        "maker/model:model-Q4_0.gguf".to_owned(),
        format!("maker/model:{}@v1/x", part(1)),
        format!("maker/model@{COMMIT}"),
    ] {
        let path = quietly(&hub, &name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(hub.resolve(&name).as_ref(), Some(&path), "{name}");
        assert_eq!(hub.base_name(&name), NAME);
        assert_eq!(path.is_file(), name.contains(".gguf"), "{name}");
        found.push((name, path));
    }
    assert_eq!(fs::read(&found[1].1).unwrap(), weights());
    let second = found[2].1.with_file_name("model-00002-of-00002.gguf");
    assert_eq!(fs::read(second).unwrap(), weights()[4..], "a file comes with its other parts");
    let mut cached: Vec<_> = hub.list_cached().unwrap().into_iter().map(|cached| cached.name).collect();
    let mut names: Vec<_> = found.iter().map(|(name, _)| name.clone()).collect();
    cached.sort();
    names.sort();
    assert_eq!(cached, names);
    // All of them are found offline by another program's cache, also by the names of revisions.
    (hub.home, hub.offline) = (home.path().join("another"), true);
    for (name, path) in &found {
        assert_eq!(quietly(&hub, name).unwrap_or_else(|e| panic!("{name}: {e}")), *path);
    }
    hub.offline = false;
    for (name, expected) in [
        ("maker/model:model-Q9.gguf", "it has `model-Q4_0.gguf`, `big/model-00001-of-00002.gguf`"),
        ("maker/model@nowhere", "the branch, tag or commit behind the `@`"),
    ] {
        let error = quietly(&hub, name).unwrap_err().to_string();
        assert!(error.contains(expected), "{name}: {error}");
    }
    server.state.lock().unwrap().files.retain(|file| !file.name.ends_with(".safetensors"));
    hub.home = home.path().join("third");
    let error = quietly(&hub, NAME).unwrap_err().to_string();
    assert!(error.contains("pull one as `maker/model:FILE`") && error.contains("model-Q4_0.gguf"), "{error}");
}

#[test]
fn a_gated_repository_says_what_it_wants() {
    for (token, status, expected) in [
        (None, 401, "set `HF_TOKEN`"),
        (Some("old"), 401, "set `HF_TOKEN`"),
        (Some("good"), 403, "accept the model's terms"),
    ] {
        let (_home, server, mut hub) = setup();
        hub.token = token.map(str::to_owned);
        server.state.lock().unwrap().gate = Some(("another".to_owned(), status));
        let error = quietly(&hub, NAME).unwrap_err();
        assert!(
            error.code() == ErrorCode::Network && error.to_string().contains(expected),
            "{token:?} {status}: {error}"
        );
        assert!(!error.to_string().contains("good") && hub.resolve(NAME).is_none(), "{error}");
        hub.token = Some("another".to_owned());
        quietly(&hub, NAME).unwrap();
    }
}

#[test]
fn a_dead_endpoint_is_given_up_within_ten_seconds() {
    // Connections are accepted by the system and never answered.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let home = tempfile::tempdir().unwrap();
    let mut hub = Hub::at(home.path());
    hub.endpoint = Some(format!("http://{}", silent.local_addr().unwrap()));
    let start = Instant::now();
    let error = quietly(&hub, NAME).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_eq!(error.code(), ErrorCode::Network);
    assert!(error.to_string().contains("no answer within 8 s"), "{error}");
}

#[test]
fn a_transfer_that_stands_still_is_given_up_and_resumed_by_the_next_pull() {
    let (_home, server, mut hub) = setup();
    hub.stall_within = Duration::from_millis(700);
    server.state.lock().unwrap().stall = true;
    let error = quietly(&hub, NAME).unwrap_err();
    assert!(error.to_string().contains("no answer within 0.7 s"), "{error}");
    server.state.lock().unwrap().stall = false;
    // The hung thread keeps the lock of its file until its connection is given up: as if another process pulled it. The lock
    // ends with the process, which a new folder stands for here.
    hub.hub_cache = hub.hub_cache.with_extension("2");
    quietly(&hub, NAME).unwrap();
}

#[test]
fn a_caller_can_stop_it() {
    let (_home, server, hub) = setup();
    server.state.lock().unwrap().stall = true;
    let error = hub
        .pull(NAME, &mut |event| match event {
            Event::Progress { total: Some(_), .. } => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        })
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::Cancelled);
    assert_eq!(hub.resolve(NAME), None);
}

#[test]
fn offline_uses_what_the_hubs_cache_has() {
    let (home, server, mut hub) = setup();
    let path = quietly(&hub, NAME).unwrap();
    let asked = server.state.lock().unwrap().log.len();
    hub.home = home.path().join("another");
    hub.offline = true;
    assert_eq!(quietly(&hub, NAME).unwrap(), path);
    assert_eq!(server.state.lock().unwrap().log.len(), asked);

    hub.hub_cache = home.path().join("empty");
    hub.home = home.path().join("third");
    let error = quietly(&hub, NAME).unwrap_err();
    assert!(error.to_string().contains("HF_HUB_OFFLINE"), "{error}");
}
