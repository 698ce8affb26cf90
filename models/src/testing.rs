//! A small config for the tests of families.

use serde_json::{Map, Value, json};

/// The keys that every family needs, with those of `change` set.
pub(crate) fn config(model_type: &str, change: &Value) -> Map<String, Value> {
    let mut config = json!({"model_type": model_type, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 32, "vocab_size": 100, "max_position_embeddings": 512});
    let (Value::Object(map), Value::Object(change)) = (&mut config, change) else { unreachable!() };
    map.extend(change.clone());
    map.clone()
}

/// The key that such a model is refused for, or none.
pub(crate) fn refused_key(model_type: &str, change: &Value) -> Option<String> {
    crate::build(&config(model_type, change)).err().map(|e| e.key)
}
