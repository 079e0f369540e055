// SPDX-License-Identifier: Apache-2.0

// Package structure keeps the shape of the code base that docs/design.md describes: who may import
// whom, where the environment is read, one package comment each, and sizes a reader can hold.
package structure

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/ims-buildenv/ims-buildenv/"

type goPackage struct {
	ImportPath   string
	Dir          string
	GoFiles      []string
	CgoFiles     []string
	IgnoredFiles []string `json:"IgnoredGoFiles"`
	Imports      []string
	Deps         []string
}

func (p goPackage) files() []string {
	var paths []string
	for _, name := range slices.Concat(p.GoFiles, p.CgoFiles, p.IgnoredFiles) {
		if !strings.HasSuffix(name, "_test.go") {
			paths = append(paths, filepath.Join(p.Dir, name))
		}
	}
	return paths
}

func packages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json", "./cmd/...", "./internal/...")
	cmd.Dir = "../.."
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var list []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); dec.More(); {
		var p goPackage
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
	if len(list) < 10 {
		t.Fatalf("go list found only %d packages", len(list))
	}
	return list
}

// The layers: commands call the middle, the middle calls leaves, leaves stand alone.
var (
	middle = []string{"job", "gateway", "prepare", "local"}
	// leafToLeaf lists the leaves that may use internal/imageroot, because what they handle lies
	// inside a hostile image root.
	leafToLeaf = []string{"squash", "jail", "prepare", "signalfile"}
	// alsoLeafToLeaf lists single exceptions: the jail's SFTP child is the jail's, its protocol is not;
	// changes are those between two images.
	alsoLeafToLeaf = map[string]string{"jail": "sftpserver", "changes": "squash"}
	// composed lists what is made of several leaves: layers is the one image root of both layouts.
	composed = map[string][]string{"layers": {"imageroot", "layout", "squash"}}
	// forbidden names modules that must not be reachable from a package, and why.
	forbidden = map[string][]string{
		// The engine is a library: bytes in, bytes out.
		"squash":  {"net/http", "github.com/aws/", "golang.org/x/crypto/ssh", module + "internal/ims"},
		"changes": {"net/http", "github.com/aws/", "os/exec"},
		// What root in the jail talks to must hold no code that handles S3 or OAuth secrets.
		"gateway": {"github.com/aws/", "golang.org/x/oauth2", module + "internal/ims", module + "internal/upload"},
	}
)

func TestImportRules(t *testing.T) {
	for _, p := range packages(t) {
		name, internal := strings.CutPrefix(p.ImportPath, module+"internal/")
		for _, imported := range p.Imports {
			target, ok := strings.CutPrefix(imported, module+"internal/")
			if !ok {
				if strings.HasPrefix(imported, module+"cmd/") {
					t.Errorf("%s imports a command: %s", p.ImportPath, imported)
				}
				continue
			}
			root, _, _ := strings.Cut(target, "/")
			self, _, _ := strings.Cut(name, "/")
			switch {
			case self == "testkit":
			case root == "testkit":
				t.Errorf("%s: internal/testkit is for tests only", p.ImportPath)
			case !internal, root == self:
			case slices.Contains(middle, root):
				t.Errorf("internal/%s imports internal/%s: only commands call %v", name, root, middle)
			case slices.Contains(middle, self):
			case root == "imageroot" && slices.Contains(leafToLeaf, self):
			case alsoLeafToLeaf[self] == root:
			case slices.Contains(composed[self], root):
			default:
				t.Errorf("leaf internal/%s imports leaf internal/%s", name, root)
			}
		}
		for _, prefix := range forbidden[name] {
			for _, dep := range p.Deps {
				if strings.HasPrefix(dep, prefix) {
					t.Errorf("internal/%s depends on %s", name, dep)
				}
			}
		}
	}
}

func TestOnlyConfigReadsTheEnvironment(t *testing.T) {
	// The jail's child modes hand on the environment that the jail built for a session.
	exempt := regexp.MustCompile(`/internal/(config|jail|testkit)(/|$)`)
	for _, p := range packages(t) {
		if exempt.MatchString(p.ImportPath) {
			continue
		}
		for _, path := range p.files() {
			file := parse(t, path, parser.SkipObjectResolution)
			ast.Inspect(file, func(n ast.Node) bool {
				sel, ok := n.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				if pkg, ok := sel.X.(*ast.Ident); ok && pkg.Name == "os" &&
					slices.Contains([]string{"Getenv", "LookupEnv", "Environ"}, sel.Sel.Name) {
					t.Errorf("%s: os.%s: only internal/config reads the environment", path, sel.Sel.Name)
				}
				return true
			})
		}
	}
}

func TestOnePackageComment(t *testing.T) {
	for _, p := range packages(t) {
		var documented []string
		for _, path := range p.files() {
			if file := parse(t, path, parser.PackageClauseOnly|parser.ParseComments); file.Doc != nil {
				documented = append(documented, filepath.Base(path))
			}
		}
		if len(documented) != 1 {
			t.Errorf("%s: package comments in %v, want exactly one", p.ImportPath, documented)
		}
	}
}

// TestCryptoFloor: releases of the SSH library before this one have known holes, and gliderlabs/ssh asks for an older one.
func TestCryptoFloor(t *testing.T) {
	const least = 55
	text, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^\s+golang\.org/x/crypto v0\.(\d+)\.`).FindSubmatch(text)
	if m == nil {
		t.Fatal("go.mod does not require a v0 of golang.org/x/crypto")
	}
	if minor, err := strconv.Atoi(string(m[1])); err != nil || minor < least {
		t.Errorf("golang.org/x/crypto v0.%s: want v0.%d at least", m[1], least)
	}
}

func TestSizes(t *testing.T) {
	for _, p := range packages(t) {
		for _, path := range p.files() {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			limit := 600
			if filepath.Base(path) == "main.go" && strings.Contains(p.ImportPath, "/cmd/") {
				limit = 60
			}
			if lines := strings.Count(string(data), "\n"); lines > limit {
				t.Errorf("%s: %d lines, at most %d", path, lines, limit)
			}
		}
	}
}

func parse(t *testing.T, path string, mode parser.Mode) *ast.File {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, mode)
	if err != nil {
		t.Fatal(err)
	}
	return file
}
