//! Obtains an image into a folder and says how long it took: what pulling costs, without the rest of SealCI.
//!
//! `obtain FOLDER REFERENCE [INSECURE-REGISTRY]`; `oci:` and `docker-archive:` images lie in the current folder.

use std::path::Path;
use std::time::Instant;

use sealci_image::{ImageStore, PullPolicy, StoreOptions, Wanted};

type Failure = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, reference, rest @ ..] = &arguments[..] else {
        return Err("obtain FOLDER REFERENCE [INSECURE-REGISTRY]".into());
    };
    let images_folder = Some(std::env::current_dir()?);
    let mut options = StoreOptions { images_folder, ..StoreOptions::default() };
    options.registries.insecure.extend(rest.iter().cloned());
    let started = Instant::now();
    let store = ImageStore::open(Path::new(folder), options)?;
    let wanted = Wanted { reference: reference.parse()?, pull: PullPolicy::IfMissing };
    let image = store.obtain(&wanted, &|line: &str| println!("{line}")).await?;
    println!("{} after {} ms", image.digest, started.elapsed().as_millis());
    for layer in &image.layers {
        println!("{}", layer.display());
    }
    let again = Instant::now();
    store.obtain(&wanted, &|line: &str| println!("{line}")).await?;
    println!("once more after {} us", again.elapsed().as_micros());
    store.close().await;
    println!("durable after {} ms", started.elapsed().as_millis());
    Ok(())
}
