//! The lab and the capture checker themselves.

use palisade_ocf_tests::{Error, Turn, must, top};

fn check_lab(name: &str) -> Result<(), Error> {
    let _turn = Turn::take()?;
    let program = top().join("ocf-tests/lab/test-lab.sh").display().to_string();
    let out = must(&["env", "ROUNDS=2", &program, name])?;
    assert!(out.ends_with(&format!("PASSED: {name}\n")), "{out}");
    Ok(())
}

macro_rules! lab_checks {
    ($($name:ident),*) => {
        mod lab {
            $(#[test]
            fn $name() -> Result<(), palisade_ocf_tests::Error> {
                super::check_lab(stringify!($name))
            })*

            #[test]
            fn every_check_is_listed_here() {
                let program = palisade_ocf_tests::top().join("ocf-tests/lab/test-lab.sh");
                let names = palisade_ocf_tests::must(&[program.as_os_str(), "-l".as_ref()]).unwrap();
                let here = [$(stringify!($name)),*];
                assert_eq!(names.lines().collect::<Vec<_>>(), here);
            }
        }
    };
}

lab_checks!(
    agents,
    bind,
    crash,
    cycle,
    disks,
    fencing,
    freeze,
    fuse,
    isolation,
    links,
    parallel,
    partition,
    persistence,
    reboot,
    systemd
);

#[test]
fn capture_checker() {
    let directory = top().join("ocf-tests/drbdwire").display().to_string();
    must(&["env", "-C", &directory, "python3", "-B", "-m", "unittest", "discover", "-s", "tests", "-t", "."])
        .unwrap();
}
