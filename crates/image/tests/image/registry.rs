//! Pulls from Debian's own registry server.

use sealci_image::{ImageError, PullPolicy};
use serde_json::json;

use crate::lab::*;

fn three_layers() -> MadeImage {
    let first = Archive::new().folder("etc/").file("etc/a", b"first\n").bytes();
    let second = Archive::new().file("etc/b", b"second\n").file("etc/.wh.a", b"").bytes();
    let third = Archive::new().folder("opt/").file("opt/.wh..wh..opq", b"").file("opt/c", b"third\n").bytes();
    let config = json!({
        "Entrypoint": ["/init"], "Cmd": ["--go"], "Env": ["PATH=/bin", "E="], "User": "1000:1000",
        "WorkingDir": "/srv", "Labels": {"org.example": "yes"}, "StopSignal": "SIGINT",
    });
    let archives = [(first, Packing::Gzip), (second, Packing::Zstd), (third, Packing::Plain)];
    image_for(&archives, this_architecture(), config)
}

#[tokio::test]
async fn layers_of_every_packing_are_pulled_checked_and_unpacked() {
    let Some(registry) = Registry::start("") else { return };
    let made = three_layers();
    registry.push(&made, "team/image:1");
    let lab = Lab::new(registry.options());
    let (image, notes) =
        obtain_noted(&lab.store, &registry.name("team/image:1"), PullPolicy::IfMissing).await;
    let image = image.unwrap();
    assert_eq!(image.digest, made.manifest.digest.to_string());
    assert_eq!(read(&image, 0, "etc/a"), "first\n");
    assert_eq!(read(&image, 1, "etc/b"), "second\n");
    assert_eq!(read(&image, 2, "opt/c"), "third\n");
    let config = &image.config;
    assert_eq!((&config.entrypoint[..], &config.command[..]), (&["/init".into()][..], &["--go".into()][..]));
    assert_eq!((config.env["PATH"].as_str(), config.env["E"].as_str()), ("/bin", ""));
    assert_eq!((config.user.as_str(), config.working_folder.as_str()), ("1000:1000", "/srv"));
    assert_eq!((config.labels["org.example"].as_str(), config.stop_signal.as_str()), ("yes", "SIGINT"));
    assert!(notes[0].starts_with("pulling ") && notes[0].contains("3 of 3 layers"), "{notes:?}");
    assert!(notes.iter().any(|note| note.starts_with("layer 2 of 3 ")), "{notes:?}");
    assert!(notes.last().unwrap().contains("is on disk after"), "{notes:?}");
    lab.store.close().await;
    // The blobs of layers are gone: an image costs its unpacked size once.
    assert_eq!((lab.names("partial").len(), lab.names("staging").len(), lab.names("blobs").len()), (0, 0, 2));
}

#[tokio::test]
async fn what_does_not_exist_is_said_to() {
    let Some(registry) = Registry::start("") else { return };
    registry.push(&three_layers(), "there:1");
    let lab = Lab::new(registry.options());
    for name in ["nowhere:1", "there:2"] {
        let error = obtain(&lab.store, &registry.name(name)).await.unwrap_err();
        assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
        assert!(error.to_string().contains(name) && error.to_string().contains("check its name"), "{error}");
    }
}
