//! Generates the typed clients from the REST documents.

use std::path::Path;
use std::{env, fs};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for name in ["controller", "monitor"] {
        let document = Path::new("../../api/openapi").join(format!("{name}.yaml"));
        println!("cargo:rerun-if-changed={}", document.display());
        let mut value: serde_json::Value = serde_saphyr::from_str(&fs::read_to_string(&document)?)?;
        leave_times_as_text(&mut value);
        let spec: openapiv3::OpenAPI = serde_json::from_value(value)?;
        let mut settings = progenitor::GenerationSettings::default();
        settings.with_interface(progenitor::InterfaceStyle::Builder);
        let tokens = progenitor::Generator::new(&settings).generate_tokens(&spec)?;
        let text = prettyplease::unparse(&syn::parse2(tokens)?);
        fs::write(Path::new(&env::var("OUT_DIR")?).join(format!("{name}.rs")), text)?;
    }
    Ok(())
}

/// Times are for showing only: as text they need no calendar library in every client.
fn leave_times_as_text(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(members) => {
            if members.get("format").is_some_and(|format| format == "date-time") {
                members.remove("format");
            }
            members.values_mut().for_each(leave_times_as_text);
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(leave_times_as_text),
        _ => {}
    }
}
