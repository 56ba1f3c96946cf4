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

/// Of `user` and `hunter2`, by bcrypt.
const HTPASSWD: &str = "$2y$05$abcdefghijklmnopqrstuuoXuKqgZXLiJqzfmMXDDhSFPIvxV7t8.";

#[tokio::test]
async fn a_registry_with_a_password_opens_with_it_only() {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("htpasswd");
    std::fs::write(&file, format!("user:{HTPASSWD}\n")).unwrap();
    let extra = format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", file.display());
    let Some(registry) = Registry::start(&extra) else { return };
    let layout = tempfile::TempDir::new().unwrap();
    write_layout(layout.path(), &[("it", &three_layers())]);
    registry.copy(&format!("oci:{}:it", layout.path().display()), "a:1", &["--dest-creds", "user:hunter2"]);
    let name = registry.name("a:1");
    let error = obtain(&Lab::new(registry.options()).store, &name).await.unwrap_err();
    assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
    for (password, opens) in [("hunter3", false), ("hunter2", true)] {
        let mut options = registry.options();
        options.registries.credentials.insert(&registry.host, "user", password.to_owned().into());
        match obtain(&Lab::new(options).store, &name).await {
            Ok(_) => assert!(opens),
            Err(error) => {
                assert!(!opens && matches!(error, ImageError::Unauthorized { .. }), "{error}");
                assert!(!format!("{error} {error:?}").contains(password), "{error:?}");
            }
        }
    }
}

#[tokio::test]
async fn an_index_of_two_platforms_is_pulled_as_skopeo_pushed_it() {
    let Some(registry) = Registry::start("") else { return };
    let own = three_layers();
    let other = image_for(&[(Archive::new().file("x", b"x").bytes(), Packing::Gzip)], "s390x", json!({}));
    let layout = tempfile::TempDir::new().unwrap();
    write_layout(layout.path(), &[("own", &own), ("other", &other)]);
    let entry = |image: &MadeImage, architecture: &str| {
        let mut entry = descriptor(&image.manifest, MANIFEST_TYPE);
        entry["platform"] = json!({"os": "linux", "architecture": architecture});
        entry
    };
    let entries = [entry(&other, "s390x"), entry(&own, this_architecture())];
    let index = Blob::json(&json!({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}));
    std::fs::write(layout.path().join("blobs/sha256").join(index.digest.hex()), &index.bytes).unwrap();
    let mut listed = descriptor(&index, INDEX_TYPE);
    listed["annotations"] = json!({"org.opencontainers.image.ref.name": "both"});
    let top = json!({"schemaVersion": 2, "manifests": [listed]});
    std::fs::write(layout.path().join("index.json"), top.to_string()).unwrap();
    registry.copy(&format!("oci:{}:both", layout.path().display()), "a:1", &["--all"]);

    let mut options = registry.options();
    options.images_folder = Some(layout.path().parent().unwrap().to_owned());
    let lab = Lab::new(options);
    let pinned = format!("{}@{}", registry.name("a"), index.digest);
    let folder = layout.path().file_name().unwrap().to_str().unwrap();
    for name in [registry.name("a:1"), pinned, format!("oci:{folder}:both")] {
        let image = obtain(&lab.store, &name).await.unwrap();
        assert_eq!(image.digest, own.manifest.digest.to_string(), "{name}");
    }
}

#[tokio::test]
async fn a_registry_with_an_authority_of_ones_own_is_trusted_when_it_is_named() {
    let folder = tempfile::TempDir::new().unwrap();
    let key = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let (certificate, secret) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    std::fs::write(&certificate, key.cert.pem()).unwrap();
    std::fs::write(&secret, key.signing_key.serialize_pem()).unwrap();
    let extra =
        format!("  tls:\n    certificate: {}\n    key: {}\n", certificate.display(), secret.display());
    let Some(registry) = Registry::start(&extra) else { return };
    registry.push(&three_layers(), "a:1");
    let mut options = options();
    options.timeouts.retries = 0;
    let error = obtain(&Lab::new(options.clone()).store, &registry.name("a:1")).await.unwrap_err();
    assert!(matches!(error, ImageError::Unreachable { .. }), "{error}");
    options.registries.authorities = key.cert.pem().into_bytes();
    obtain(&Lab::new(options).store, &registry.name("a:1")).await.unwrap();
}

#[tokio::test]
async fn archives_and_layouts_that_skopeo_made_are_read() {
    if program("skopeo", "images in files").is_none() {
        return;
    }
    let images = tempfile::TempDir::new().unwrap();
    // Docker's form knows no zstd.
    let layer = |name: &str| (Archive::new().file(name, name.as_bytes()).bytes(), Packing::Gzip);
    let made =
        image_for(&[layer("a"), layer("b"), layer("c")], this_architecture(), json!({"User": "1000:1000"}));
    write_layout(&images.path().join("made"), &[("it", &made)]);
    let copy = |to: &str| {
        let from = format!("oci:{}/made:it", images.path().display());
        let output = std::process::Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet", &from, to])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    copy(&format!("docker-archive:{}/saved.tar:team/image:1", images.path().display()));
    copy(&format!("oci:{}/layout:1", images.path().display()));
    let lab =
        Lab::new(sealci_image::StoreOptions { images_folder: Some(images.path().to_owned()), ..options() });
    for name in ["docker-archive:saved.tar", "oci:layout:1", "oci:layout"] {
        for pull in [PullPolicy::IfMissing, PullPolicy::Never, PullPolicy::Always] {
            let (image, _) = obtain_noted(&lab.store, name, pull).await;
            let image = image.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!((image.layers.len(), read(&image, 2, "c")), (3, "c".into()), "{name}");
            assert_eq!(image.config.user, "1000:1000");
        }
    }
    // Packed by no one: the same layers, so they are there once.
    assert_eq!(lab.names("layers").len(), 3);
}

#[tokio::test]
async fn local_images_that_are_not_sound_are_refused() {
    let images = tempfile::TempDir::new().unwrap();
    let made = three_layers();
    let folder = images.path().join("it");
    write_layout(&folder, &[("1", &made), ("2", &made)]);
    let mut options = options();
    let error = obtain(&Lab::new(options.clone()).store, "oci:it:1").await.unwrap_err();
    assert!(matches!(error, ImageError::NoImagesFolder { .. }), "{error}");
    options.images_folder = Some(images.path().to_owned());
    let lab = Lab::new(options);
    std::fs::write(images.path().join("junk.tar"), "junk".repeat(1000)).unwrap();
    std::os::unix::fs::symlink("/etc", images.path().join("etc")).unwrap();
    rustix::fs::mknodat(
        std::fs::File::open(images.path()).unwrap(),
        "fifo",
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    for (name, part) in [
        ("oci:it:3", "there is 1, 2"),
        ("oci:it", "there is 1, 2"),
        ("oci:nothing", "there is no image"),
        ("oci:etc", "cannot be used"),
        ("docker-archive:etc/passwd", "cannot be used"),
        ("docker-archive:fifo", "cannot be used"),
        ("docker-archive:it", "cannot be used"),
        ("docker-archive:nothing.tar", "there is no image"),
        ("docker-archive:junk.tar", "cannot be understood"),
    ] {
        let error = obtain(&lab.store, name).await.unwrap_err().to_string();
        assert!(error.contains(part), "{name}: {error}");
    }
    // A layer that is not what it was.
    let blob = folder.join("blobs/sha256").join(made.layers[1].digest.hex());
    let mut changed = made.layers[1].bytes.clone();
    let middle = changed.len() / 2;
    changed[middle] ^= 1;
    std::fs::write(&blob, changed).unwrap();
    let error = obtain(&lab.store, "oci:it:1").await.unwrap_err();
    assert!(matches!(error, ImageError::CorruptLayer { .. }), "{error}");
    std::fs::write(&blob, &made.layers[1].bytes).unwrap();
    obtain(&lab.store, "oci:it:1").await.unwrap();
}
