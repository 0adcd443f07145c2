//! Profiles are compiled, and what comes out is run.

use super::*;

fn rule(names: &[&str], action: &str, args: Vec<LinuxSeccompArg>) -> LinuxSyscall {
    LinuxSyscall {
        names: names.iter().map(ToString::to_string).collect(),
        action: action.to_owned(),
        errno_ret: None,
        args,
    }
}

fn arg(index: u64, op: &str, value: u64, value_two: u64) -> LinuxSeccompArg {
    LinuxSeccompArg { index, value, value_two, op: op.to_owned() }
}

fn filter(default: &str, syscalls: Vec<LinuxSyscall>) -> Filter {
    let profile =
        LinuxSeccomp { default_action: default.to_owned(), syscalls, ..LinuxSeccomp::default() };
    Filter::compile(&profile).unwrap()
}

#[test]
fn listed_call_is_allowed_and_any_other_gets_the_default() {
    let mut refused = rule(&["clone3"], "SCMP_ACT_ERRNO", vec![]);
    refused.errno_ret = Some(ErrnoRet::Errnoret(38));
    let filter = filter(
        "SCMP_ACT_ERRNO",
        vec![rule(&["read", "nonexistent", "write"], "SCMP_ACT_ALLOW", vec![]), refused],
    );
    assert_eq!(filter.run(ARCHITECTURE, 0, [0; 6]), ALLOW);
    assert_eq!(filter.run(ARCHITECTURE, 1, [0; 6]), ALLOW);
    assert_eq!(filter.run(ARCHITECTURE, 2, [0; 6]), ERRNO | 1);
    assert_eq!(filter.run(ARCHITECTURE, 435, [0; 6]), ERRNO | 38);
    assert_eq!(filter.run(ARCHITECTURE, X32_BIT, [0; 6]), ERRNO | 1);
    assert_eq!(filter.run(0x4000_0003, 1, [0; 6]), ERRNO | 1);
}

#[test]
fn profile_that_allows_by_default_does_not_allow_other_architectures() {
    let filter = filter("SCMP_ACT_ALLOW", vec![rule(&["mkdir"], "SCMP_ACT_KILL", vec![])]);
    assert_eq!(filter.run(ARCHITECTURE, 83, [0; 6]), KILL_THREAD);
    assert_eq!(filter.run(ARCHITECTURE, 84, [0; 6]), ALLOW);
    assert_eq!(filter.run(ARCHITECTURE, X32_BIT | 83, [0; 6]), KILL_PROCESS);
}

#[test]
fn every_operator_compares_all_64_bits() {
    type Holds = fn(u64, u64) -> bool;
    let operators: [(&str, Holds); 6] = [
        ("SCMP_CMP_EQ", |a, b| a == b),
        ("SCMP_CMP_NE", |a, b| a != b),
        ("SCMP_CMP_LT", |a, b| a < b),
        ("SCMP_CMP_LE", |a, b| a <= b),
        ("SCMP_CMP_GT", |a, b| a > b),
        ("SCMP_CMP_GE", |a, b| a >= b),
    ];
    let values = [0, 1, 5, u64::MAX, 1 << 32, (1 << 32) + 5, (5 << 32) + 1, 0xffff_ffff];
    for (op, holds) in operators {
        for bound in values {
            let rule = rule(&["read"], "SCMP_ACT_ALLOW", vec![arg(2, op, bound, 0)]);
            let filter = filter("SCMP_ACT_TRAP", vec![rule]);
            for value in values {
                let expected = if holds(value, bound) { ALLOW } else { TRAP };
                let got = filter.run(ARCHITECTURE, 0, [9, 9, value, 9, 9, 9]);
                assert_eq!(got, expected, "{value} {op} {bound}");
            }
        }
    }
}

#[test]
fn masked_comparison_looks_at_the_masked_bits_only() {
    let masked = arg(0, "SCMP_CMP_MASKED_EQ", 0x7e02_0000, 0);
    let filter = filter("SCMP_ACT_ERRNO", vec![rule(&["clone"], "SCMP_ACT_ALLOW", vec![masked])]);
    assert_eq!(filter.run(ARCHITECTURE, 56, [0x11, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(filter.run(ARCHITECTURE, 56, [0x1000_0011, 0, 0, 0, 0, 0]), ERRNO | 1);
}

#[test]
fn conditions_on_two_arguments_must_both_hold_and_on_one_either() {
    let both = vec![arg(0, "SCMP_CMP_EQ", 1, 0), arg(1, "SCMP_CMP_EQ", 2, 0)];
    let either = vec![arg(0, "SCMP_CMP_EQ", 7, 0), arg(0, "SCMP_CMP_EQ", 8, 0)];
    let filter = filter(
        "SCMP_ACT_ERRNO",
        vec![
            rule(&["socket", "read"], "SCMP_ACT_ALLOW", both),
            rule(&["personality"], "SCMP_ACT_ALLOW", either),
            rule(&["write"], "SCMP_ACT_ALLOW", vec![]),
        ],
    );
    let call = |number, first, second| {
        filter.run(ARCHITECTURE, number, [first, second, 0, 0, 0, 0]) == ALLOW
    };
    assert!(call(41, 1, 2) && call(0, 1, 2));
    assert!(!call(41, 1, 3) && !call(41, 0, 2) && !call(0, 1, 1));
    assert!(call(135, 7, 0) && call(135, 8, 0) && !call(135, 9, 0));
    assert!(call(1, 1, 2));
}
