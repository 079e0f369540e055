// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"math"
)

// chart is lines over a horizontal axis; both axes begin at 0.
type chart struct {
	title, x, y string
	lines       []series
}

type series struct {
	name   string
	points []point
}

type point struct{ x, y float64 }

// Sizes in an SVG's pixels.
const (
	chartWidth, chartHeight = 440, 300
	marginLeft, marginTop   = 56, 44
	plotWidth, plotHeight   = chartWidth - marginLeft - 20, chartHeight - marginTop - 52
)

var lineColours = []string{"#c2571a", "#1f6f8b"}

// plot draws charts side by side, as an SVG document.
func plot(charts ...chart) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12" fill="#333">`+"\n",
		chartWidth*len(charts), chartHeight)
	b.WriteString(`<rect width="100%" height="100%" fill="#fff"/>` + "\n")
	for i, c := range charts {
		fmt.Fprintf(&b, `<g transform="translate(%d 0)">`+"\n", i*chartWidth)
		c.draw(&b)
		b.WriteString("</g>\n")
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

func (c chart) draw(b *bytes.Buffer) {
	var most point
	for _, l := range c.lines {
		for _, p := range l.points {
			most.x, most.y = max(most.x, p.x), max(most.y, p.y)
		}
	}
	stepX, stepY := tick(most.x), tick(most.y)
	most.x, most.y = math.Ceil(most.x/stepX)*stepX, math.Ceil(most.y/stepY)*stepY
	at := func(p point) (x, y float64) {
		return marginLeft + p.x/most.x*plotWidth, marginTop + (1-p.y/most.y)*plotHeight
	}
	fmt.Fprintf(b, `<text x="%d" y="20" font-weight="bold">%s</text>`+"\n", marginLeft, c.title)
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="middle">%s</text>`+"\n", marginLeft+plotWidth/2, chartHeight-12, c.x)
	fmt.Fprintf(b, `<text x="%d" y="36">%s</text>`+"\n", 8, c.y)
	for v := 0.0; v <= most.y+stepY/2; v += stepY {
		x, y := at(point{0, v})
		fmt.Fprintf(b, `<path d="M%.1f %.1fh%d" stroke="#ddd"/><text x="%.1f" y="%.1f" text-anchor="end">%g</text>`+"\n", x, y, plotWidth, x-6, y+4, round(v))
	}
	for v := 0.0; v <= most.x+stepX/2; v += stepX {
		x, y := at(point{v, 0})
		fmt.Fprintf(b, `<path d="M%.1f %.1fv4" stroke="#333"/><text x="%.1f" y="%.1f" text-anchor="middle">%g</text>`+"\n", x, y, x, y+18, round(v))
	}
	for i, l := range c.lines {
		colour := lineColours[i%len(lineColours)]
		var line, dots bytes.Buffer
		for _, p := range l.points {
			x, y := at(p)
			fmt.Fprintf(&line, "%.1f,%.1f ", x, y)
			fmt.Fprintf(&dots, `<circle cx="%.1f" cy="%.1f" r="3"><title>%g: %.2f</title></circle>`, x, y, p.x, p.y)
		}
		fmt.Fprintf(b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/><g fill="%s">%s</g>`+"\n", bytes.TrimSpace(line.Bytes()), colour, colour, dots.Bytes())
		fmt.Fprintf(b, `<text x="%d" y="%d" fill="%s">%s</text>`+"\n", marginLeft+50+150*i, 36, colour, l.name)
	}
}

// tick is the distance of an axis' ticks: 1, 2 or 5 times a power of ten, and four to ten of them.
func tick(most float64) float64 {
	if most <= 0 {
		return 1
	}
	unit := math.Pow(10, math.Floor(math.Log10(most/4)))
	for _, n := range []float64{5, 2} {
		if most/unit >= 4*n {
			return n * unit
		}
	}
	return unit
}

// round takes the noise of sums off a tick's label.
func round(v float64) float64 { return math.Round(v*1e6) / 1e6 }
