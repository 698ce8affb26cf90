//! Bottleneck adapters, of which there is no reference: their gradients against differences of the loss, and their own
//! files.

use super::begun::{Losses, train};
use super::methods::{base, config, data, json, norm};
use crate::common::check_all;
use pocketlora::adapter::{AdapterFile, Kind, Merged};
use pocketlora::format::open_source;
use pocketlora::train::TrainConfig;
use serde_json::{Map, Value, json};
use std::fs;

/// Types with their functions.
const ALL: [(&str, &str); 4] =
    [("houlsby", "silu"), ("pfeiffer", "tanh"), ("parallel", "gelu_tanh"), ("houlsby", "relu2")];

fn settings(kind: &str, function: &str) -> TrainConfig {
    let options: Map<String, Value> =
        json!({"adapter_type": kind, "non_linearity": function, "scaling": 2}).as_object().unwrap().clone();
    TrainConfig { method: Kind::Bottleneck, rank: 6, targets: vec!["auto".to_owned()], options, ..config() }
}

/// The loss of `file` on the data, before a first step.
fn loss(file: &AdapterFile) -> f64 {
    let out = tempfile::tempdir().unwrap();
    let config = TrainConfig { method: Kind::Bottleneck, ..config() };
    let mut trainer = base(2).trainer(config, data(), Some(data()), Some(file), out.path()).unwrap();
    trainer.run(&mut Losses { stop_after: 1, ..Losses::default() }).unwrap().before.unwrap().held_out.unwrap()
}

#[test]
fn gradients_are_those_of_differences_and_files_do_what_was_trained() {
    let dir = tempfile::tempdir().unwrap();
    check_all(ALL, |(kind, function)| {
        let (name, out) = (format!("{kind} of {function}"), dir.path().join(format!("{kind}-{function}")));
        let (summary, _) = train(settings(kind, function), data(), &out, 2, false, 0);
        let (before, after) = (summary.before.unwrap().held_out.unwrap(), summary.eval_loss.unwrap());
        assert!(after < before - 0.01, "{name}: {before} became {after}");
        let file = AdapterFile::open(&out).unwrap();
        assert!((loss(&file) - after).abs() < 5e-4, "{name}: the file does something else");
        let written = json(&out.join("adapter_config.json"));
        assert_eq!((&written["adapter_type"], &written["non_linearity"]), (&json!(kind), &json!(function)));
        // With values that are large enough for all parts to have a gradient.
        let mut file = file;
        for tensor in file.tensors.values_mut() {
            tensor.data.iter_mut().enumerate().for_each(|(i, v)| *v += 0.05 * ((i * 7 % 11) as f32 - 5.0) / 5.0);
        }
        let again = tempfile::tempdir().unwrap();
        let config = TrainConfig { method: Kind::Bottleneck, ..config() };
        let mut trainer = base(2).trainer(config, data(), None, Some(&file), again.path()).unwrap();
        trainer.step(&mut Losses::default()).unwrap();
        for part in ["down.weight", "down.bias", "up.weight", "up.bias"] {
            let all = trainer.gradients().unwrap();
            let own: Vec<&(String, Vec<f32>)> = all.iter().filter(|(name, _)| name.ends_with(part)).collect();
            let length = norm(own.iter().flat_map(|(_, g)| g).map(|g| f64::from(*g)));
            let step = 0.02;
            let moved = |sign: f64| {
                let mut file = file.clone();
                for (name, gradient) in &own {
                    let values = &mut file.tensors.get_mut(name).unwrap().data;
                    values
                        .iter_mut()
                        .zip(gradient)
                        .for_each(|(v, g)| *v += (sign * step * f64::from(*g) / length) as f32);
                }
                loss(&file)
            };
            let found = (moved(1.0) - moved(-1.0)) / (2.0 * step);
            if (found - length).abs() > 0.01 * length + 1e-4 {
                return Err(format!("{name}, {part}: a gradient of {length} is {found} by differences"));
            }
        }
        Ok(())
    });
}

#[test]
fn their_runs_end_in_the_same_bytes_and_they_are_not_merged() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, function) in [ALL[0], ALL[2]] {
        let [whole, parts] = ["whole", "parts"].map(|end| dir.path().join(format!("{kind}-{end}")));
        train(settings(kind, function), data(), &whole, 1, false, 0);
        assert!(!train(settings(kind, function), data(), &parts, 2, false, 3).0.done);
        assert!(train(settings(kind, function), data(), &parts, 3, true, 0).0.done);
        let bytes = |out: &std::path::Path| fs::read(out.join("adapter_model.safetensors")).unwrap();
        assert!(bytes(&whole) == bytes(&parts), "{kind}");
        let (file, peft) = (AdapterFile::open(&whole).unwrap(), crate::common::golden("peft/base"));
        let refused = Merged::new(open_source(&peft).unwrap(), &peft, &[(file, 1.0)]).map(|_| ()).unwrap_err();
        assert!(refused.to_string().contains("bottleneck"), "{refused}");
    }
    for (key, value, said) in [("adapter_type", "serial", "`houlsby`"), ("non_linearity", "relu", "`silu`")] {
        let mut config = settings("houlsby", "silu");
        config.options.insert(key.to_owned(), value.into());
        let refused = base(1).trainer(config, data(), None, None, &dir.path().join("out")).map(|_| ()).unwrap_err();
        assert!(format!("{refused}").contains(said), "{refused}");
    }
}
