//! Compiles the agent protocol's .proto files, which the host side owns, into Rust messages.

use std::path::Path;

fn main() {
    let proto_dir = Path::new("../../agent_proto/proto");
    let files = ["agent.proto", "health.proto"].map(|name| proto_dir.join(name));
    println!("cargo:rerun-if-changed={}", proto_dir.display());
    let descriptors = protox::compile(&files, [proto_dir]).expect("the .proto files parse");
    let mut config = prost_build::Config::new();
    config.btree_map(["."]);
    config.compile_fds(descriptors).expect("code for the .proto files");
}
