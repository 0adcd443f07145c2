//go:build tools

// Package tools names the packages that critest's own main package is made of, so that
// `go mod tidy` keeps what `go test -c` of it needs.
package tools

import (
	_ "github.com/onsi/ginkgo/v2"
	_ "github.com/onsi/gomega"
	_ "sigs.k8s.io/cri-tools/pkg/benchmark"
	_ "sigs.k8s.io/cri-tools/pkg/validate"
)
