//! Tests of the copies that follow a host's directories.

use std::os::unix::fs::symlink;

use super::*;

fn into(target: &Path) -> Copied {
    let (target, _) = beneath::make_directories(target).unwrap();
    Copied { target, tree: Tree::new(), leaving: Vec::new() }
}

fn update(copied: &mut Copied, source: &Path) -> io::Result<()> {
    copied.bring(source, scan(source, AT_FIRST)?.unwrap())
}

fn scratch(name: &str) -> PathBuf {
    let base = std::env::temp_dir().canonicalize().unwrap();
    let path = base.join(format!("kata-agent-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).unwrap();
    path
}

#[test]
fn change_of_a_configmap_arrives_whole() {
    let (source, target) = (scratch("source"), scratch("target"));
    fs::create_dir(source.join("..data_1")).unwrap();
    fs::write(source.join("..data_1/key"), "one").unwrap();
    symlink("..data_1", source.join("..data")).unwrap();
    symlink("..data/key", source.join("key")).unwrap();
    let mut copied = into(&target);
    update(&mut copied, &source).unwrap();
    assert_eq!(fs::read_to_string(target.join("key")).unwrap(), "one");

    fs::create_dir(source.join("..data_2")).unwrap();
    fs::write(source.join("..data_2/key"), "two").unwrap();
    symlink("..data_2", source.join("..tmp")).unwrap();
    fs::rename(source.join("..tmp"), source.join("..data")).unwrap();
    fs::remove_dir_all(source.join("..data_1")).unwrap();
    update(&mut copied, &source).unwrap();
    assert_eq!(fs::read_to_string(target.join("key")).unwrap(), "two");
    assert!(target.join("..data_1/key").exists(), "somebody may be on the way to it");
    copied.sweep();
    assert!(!target.join("..data_1").exists());
    fs::remove_dir_all(source).unwrap();
    fs::remove_dir_all(target).unwrap();
}

#[test]
fn links_that_a_container_made_are_not_followed() {
    let (source, target) = (scratch("honest"), scratch("trap"));
    let outside = scratch("outside");
    fs::create_dir(source.join("sub")).unwrap();
    fs::write(source.join("sub/key"), "one").unwrap();
    let mut copied = into(&target);
    update(&mut copied, &source).unwrap();
    fs::remove_dir_all(target.join("sub")).unwrap();
    symlink(&outside, target.join("sub")).unwrap();
    fs::create_dir_all(target.join("top/full")).unwrap();
    fs::write(source.join("sub/key"), "other").unwrap();
    fs::write(source.join("top"), "new").unwrap();
    assert!(update(&mut copied, &source).is_err());
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    update(&mut copied, &source).unwrap(); // all of it again, with what is in the way replaced
    assert_eq!(fs::read_to_string(target.join("sub/key")).unwrap(), "other");
    assert_eq!(fs::read_to_string(target.join("top")).unwrap(), "new");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    for path in [source, target, outside] {
        fs::remove_dir_all(path).unwrap();
    }
}

#[test]
fn tree_beyond_the_limits_is_not_followed() {
    let source = scratch("large");
    for number in 0..=AT_FIRST.entries {
        fs::write(source.join(number.to_string()), "").unwrap();
    }
    assert!(scan(&source, AT_FIRST).unwrap().is_none());
    assert!(scan(&source, LATER).unwrap().is_some());
    fs::remove_dir_all(source).unwrap();
}

#[test]
fn link_to_what_is_gone_is_no_state_to_copy() {
    let source = scratch("stale");
    symlink("..data_1", source.join("..data")).unwrap();
    fs::create_dir(source.join("..data_2")).unwrap();
    assert!(scan(&source, AT_FIRST).is_err());
    fs::remove_file(source.join("..data")).unwrap();
    symlink("..data_2", source.join("..data")).unwrap();
    assert!(scan(&source, AT_FIRST).unwrap().is_some());
    fs::remove_dir_all(source).unwrap();
}

#[test]
fn what_a_container_keeps_does_not_stop_an_update() {
    let (source, target) = (scratch("moving"), scratch("kept"));
    fs::create_dir(source.join("old")).unwrap();
    let mut copied = into(&target);
    update(&mut copied, &source).unwrap();
    fs::write(target.join("old/mine"), "").unwrap();
    fs::remove_dir(source.join("old")).unwrap();
    fs::write(source.join("new"), "content").unwrap();
    update(&mut copied, &source).unwrap();
    assert_eq!(fs::read_to_string(target.join("new")).unwrap(), "content");
    fs::remove_dir_all(source).unwrap();
    fs::remove_dir_all(target).unwrap();
}

#[test]
fn trouble_that_lasts_is_met_less_and_less_often() {
    let mut trouble = Trouble::default();
    let mut pauses = Vec::new();
    for _ in 0..7 {
        pauses.push(trouble.pause());
        trouble.happened(Path::new("/source"), &io::Error::other("no space"));
    }
    assert_eq!(pauses, [0, 1, 3, 7, 15, 31, 31]);
}
